"""Dotted keys of a config model with their descriptions from docstrings, and the nearest key to a wrong one."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from anyflow_train.config.base import Model
from anyflow_train.text import nearest

_ENTRY = re.compile(r"^(?P<names>\w+(?:, \w+)*): (?P<text>.+)$")


def variants(annotation: Any) -> list[type[Model]]:
    """List the models that a field may hold: none for a value or a list, several for a union tagged by `kind`."""
    if typing.get_origin(annotation) is tuple:
        return []
    if inspect.isclass(annotation) and issubclass(annotation, Model):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in variants(part)]


def chosen(models: list[type[Model]], value: Any) -> list[type[Model]]:
    """Select the models with the `kind` of `value`, or else those that accept any kind; all if there is no `kind`."""
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if kind is None or not all("kind" in model.model_fields for model in models):
        return models
    kinds = [(model, typing.get_args(model.model_fields["kind"].annotation)) for model in models]
    named = [model for model, known in kinds if kind in known]
    return named or [model for model, known in kinds if not known] or models


def walk(model: type[Model], values: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every leaf of `model` in order; of a union, only the variant with the `kind` in `values`.

    Args:
        values: the mapping for `model`.
        prefix: prefix of the dotted keys.
    """
    for name, field in model.model_fields.items():
        value = values.get(name) if isinstance(values, Mapping) else None
        nested = chosen(variants(field.annotation), value)
        for variant in nested:
            yield from walk(variant, value, f"{prefix}{name}.")
        if not nested:
            yield f"{prefix}{name}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def field_texts(model: type[Model]) -> dict[str, str]:
    """Map field -> description, from the lines `name: text` (or `a, b: text`) of the docstrings of class and bases."""
    texts: dict[str, str] = {}
    current: list[str] = []
    docs = "\n\n".join(inspect.cleandoc(base.__doc__ or "") for base in reversed(model.__mro__))
    for line in docs.splitlines():
        entry = _ENTRY.match(line)
        names = entry["names"].split(", ") if entry else []
        if entry and all(name in model.model_fields for name in names):
            current = names
            texts.update(dict.fromkeys(names, entry["text"]))
        elif line.startswith("    ") and current:
            texts.update({name: f"{texts[name]} {line.strip()}" for name in current})
        else:
            current = []
    return texts


def summary(model: type[Model]) -> str:
    """Return the first paragraph of the model's docstring on one line."""
    return " ".join(inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].split())


def nearest_key(wrong: str, keys: Iterable[str]) -> str | None:
    """Guess the valid key that was meant: one with the same last part elsewhere, or else the closest spelling."""
    known = list(dict.fromkeys(keys))
    parent, _, last = wrong.rpartition(".")
    same_name = [key for key in known if key.rpartition(".")[2] == last]
    if same_name:
        return nearest(wrong, same_name, 0.0)
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent}
    anywhere = {key.rpartition(".")[2]: key for key in known}
    for candidates, cutoff in ((siblings, 0.5), (anywhere, 0.6)):
        if close := nearest(last, candidates, cutoff):
            return candidates[close]
    return nearest(wrong, known, 0.8)


def type_name(annotation: Any) -> str:
    """Return a field's type as shown to users: `int`, `fp32 | bf16`, `list of int`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(type_name, arguments))
    if origin is tuple:
        return f"list of {type_name(arguments[0])}"
    if variants(annotation):
        return f"{{{', '.join(annotation.model_fields)}}}"
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def show(value: Any) -> str:
    """Format a value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return "[" + ",".join(show(item) for item in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
