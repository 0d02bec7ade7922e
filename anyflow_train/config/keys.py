"""Dotted keys of a config model with their descriptions from docstrings, and the nearest key to a wrong one."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from anyflow_train.config.base import Model
from anyflow_train.text import nearest

_ENTRY = re.compile(r"^(?P<names>\w+(?:, \w+)*): (?P<text>.+)$")


@dataclass(frozen=True)
class Key:
    """One leaf of a config: dotted name, type, default (None if required), and description from the docstring."""

    dotted: str
    type: str
    default: str | None
    text: str


def variants(annotation: Any) -> list[type[Model]]:
    """List the models that a field may hold: none for a plain value, several for a union tagged by `kind`."""
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


def walk(
    model: type[Model], values: Mapping[str, Any] | None = None, prefix: str = "", defaults: Model | None = None
) -> Iterator[Key]:
    """Yield every leaf of `model` in order.

    Args:
        values: if given, only the union variant with the `kind` found there; else all variants.
        prefix: prefix of the dotted keys.
        defaults: default instance of this model in its owner, if there is one.
    """
    texts = field_texts(model)
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{name}"
        value = values.get(name) if values is not None else None
        default = getattr(defaults, name) if defaults is not None else field.get_default(call_default_factory=True)
        if nested := variants(field.annotation):
            for variant in chosen(nested, value):
                inner = default if isinstance(default, variant) else None
                yield from walk(variant, value if isinstance(value, Mapping) else None, f"{dotted}.", inner)
        else:
            required = field.is_required() and defaults is None
            yield Key(dotted, type_name(field), None if required else show(default), texts.get(name, ""))


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


def type_name(field: FieldInfo) -> str:
    """Return the field's type as shown to users: `int`, `fp32 | bf16`, `list of int`."""
    return _type_name(field.annotation)


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


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is typing.Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if annotation is type(None):
        return "null"
    return getattr(annotation, "__name__", str(annotation))


def show(value: Any) -> str:
    """Format a value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return "[" + ",".join(show(item) for item in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
