"""Mapping -> model, with strict types and all errors at once."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from anyflow_train.config.base import Model
from anyflow_train.config.findings import Finding
from anyflow_train.config.keys import nearest_key, walk
from anyflow_train.errors import UserError
from anyflow_train.text import nearest_hint

M = TypeVar("M", bound=Model)

NAMES = "use letters, digits and . _ = , + -, and start with a letter or digit"
FORMS = {"push": "write owner/name", "notify": "write an address that begins with https:// or http://"}
"""What to write for keys whose text must match a pattern; all others are names of files."""


def decode(
    model: type[M],
    values: Mapping[str, Any],
    rules: Callable[[M], Iterable[Finding]],
    known: Mapping[str, str],
    fallback: Callable[[], Mapping[str, Any]],
) -> tuple[M | None, list[UserError]]:
    """Decode `values` and check the result with `rules`.

    Field errors do not hide rule errors: a wrong key takes its value from `fallback` or its default, and rules that do
    not involve a wrong key are still checked. If a wrong key has neither, only field errors are reported.

    Args:
        known: dotted keys that hold a placeholder because they have no value, with the message for each.
        fallback: returns the values of the same config before the user changed it; called only if needed.

    Returns:
        The model (None if there are errors) and the errors.
    """
    errors = [UserError(key, message) for key, message in known.items()]
    wrong = set(known)
    decoded, details = validate(model, values)
    wrong_fields = list(field_errors(model, values, details))
    errors += [UserError(dotted, message) for field, dotted, message in wrong_fields if field not in wrong]
    wrong |= {field for field, _, _ in wrong_fields}
    if decoded is None:
        decoded, _ = validate(model, _replaced(values, wrong, fallback()))
    if decoded is not None:
        errors += [finding.error() for finding in rules(decoded) if not finding.involves(wrong)]
    return (None if errors else decoded), errors


def _replaced(values: Mapping[str, Any], keys: Iterable[str], fallback: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a nested mapping with some dotted keys set to the fallback's value, or removed if it has none."""
    result = copy.deepcopy(dict(values))
    for key in keys:
        parent, _, last = key.rpartition(".")
        node, spare = _at(result, parent), _at(fallback, parent)
        if isinstance(node, dict):
            node.pop(last, None)
            if isinstance(spare, Mapping) and last in spare:
                node[last] = spare[last]
    return result


def _at(values: Any, dotted: str) -> Any:
    """Return the value at a dotted key; None if there is none."""
    for part in dotted.split(".") if dotted else ():
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def validate(model: type[M], values: Mapping[str, Any]) -> tuple[M | None, list[ErrorDetails]]:
    """Decode `values` strictly. Returns the model, or None and pydantic's errors."""
    # Through JSON, because strict pydantic then accepts a list for a tuple and no other conversion. A saved
    # config.json is read back in this way too.
    try:
        return model.model_validate_json(json.dumps(values), strict=True), []
    except ValidationError as error:
        return None, error.errors(include_url=False, include_context=True)


def field_errors(
    model: type[Model], values: Mapping[str, Any], details: Iterable[ErrorDetails]
) -> Iterator[tuple[str, str, str]]:
    """Iterate over the errors: wrong field, dotted key to report (may be a place inside the field), and message."""
    keys = list(walk(model, values))
    details = list(details)
    wrong = {detail["loc"][:-1] for detail in details if isinstance(detail["loc"][-1], int)}
    for detail in details:
        if detail["loc"] in wrong:
            continue  # a list that would be too short without its wrong items
        field, dotted = _dotted(detail, values)
        if detail["type"] == "extra_forbidden":
            for leaf in _leaves(dotted, detail["input"]):
                if leaf in model.renamed:
                    yield field, leaf, f"is now called {model.renamed[leaf]}"
                    continue
                near = nearest_key(leaf, keys)
                yield field, leaf, f"unknown key{_kind_beside(field, values)}{f'; nearest is {near!r}' if near else ''}"
        elif detail["type"] == "missing":
            yield field, dotted, f"missing: give {dotted}=..."
        elif detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
            yield field, f"{dotted}.kind", _wrong_kind(detail)
        elif detail["type"] == "literal_error":
            yield field, dotted, _wrong_choice(detail)
        elif detail["type"] == "string_pattern_mismatch":
            yield field, dotted, f"{_show(detail['input'])} is wrong: {FORMS.get(dotted, NAMES)}"
        else:
            yield field, dotted, f"{_show(detail['input'])} is wrong: {_plain_words(detail['msg'])}"


def _dotted(detail: ErrorDetails, values: Mapping[str, Any]) -> tuple[str, str]:
    """Return the field and the place inside it as a user writes them, without pydantic's union tags."""
    node: Any = values
    parts: list[str] = []
    depth = 0
    for part in detail["loc"]:
        if isinstance(node, Mapping) and part not in node and part == node.get("kind"):
            continue
        parts.append(str(part))
        if isinstance(part, str):
            depth = len(parts)
        if isinstance(node, Mapping):
            node = node.get(str(part))
        elif isinstance(node, Sequence) and isinstance(part, int):
            node = node[part] if part < len(node) else None
    return ".".join(parts[:depth]), ".".join(parts)


def _leaves(dotted: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(f"{dotted}.{name}", inner)
    else:
        yield dotted


def _kind_beside(dotted: str, values: Mapping[str, Any]) -> str:
    """Return ` with parent.kind=x` if the mapping of a key has a kind, because another kind may know the key."""
    parent = dotted.rpartition(".")[0]
    node = _at(values, parent)
    key = f"{parent}.kind".lstrip(".")
    return f" with {key}={node['kind']}" if isinstance(node, Mapping) and "kind" in node else ""


def _wrong_kind(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    valid = context.get("expected_tags", "").replace("'", "")
    tag = context.get("tag")
    if tag is None:
        return f"missing or not a mapping with `kind`{f': valid are {valid}' if valid else ''}"
    return f"{tag!r} is wrong: valid are {valid}"


def _wrong_choice(detail: ErrorDetails) -> str:
    value, expected = detail["input"], str(detail.get("ctx", {}).get("expected", ""))
    options = [part.strip("'") for part in expected.replace(" or ", ", ").split(", ")]
    return f"{_show(value)} is wrong: valid are {', '.join(options)}{nearest_hint(str(value), options)}"


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain_words(message: str) -> str:
    words = message.replace("Tuple", "list").replace("after validation, ", "").replace("Input", "it")
    words = words.replace("valid array", "list").replace("valid dictionary", "mapping of keys to values")
    return words[:1].lower() + words[1:]
