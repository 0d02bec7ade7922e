"""Keys that a config file sets for another kind than the chosen one: they are left out, with a warning.

So `experiment=tiny objective=flow_matching` works, although the experiment tunes keys of the flow map. A key that the
user typed stays an error, and so does one that no kind knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from anyflow_train.config.base import Model
from anyflow_train.config.findings import Finding
from anyflow_train.config.keys import chosen, variants


def drop_foreign_keys(
    model: type[Model], values: dict[str, Any], typed: Sequence[str], prefix: str = ""
) -> Iterator[Finding]:
    """Remove such keys from nested `values`, and give one finding for each mapping that had some.

    Args:
        typed: keys and groups as the user wrote them.
        prefix: of the dotted keys of `values`.
    """
    for name, field in model.model_fields.items():
        node, kinds, dotted = values.get(name), variants(field.annotation), f"{prefix}{name}"
        if not isinstance(node, dict) or not kinds:
            continue
        fitting = chosen(kinds, node)
        if len(fitting) > 1:  # it names none of the kinds, which is an error of its own
            continue
        foreign = [
            key
            for key in node.keys() - fitting[0].model_fields.keys()
            if not any(_inside(one, f"{dotted}.{key}") for one in typed)
            and (_changes_kind(dotted, typed) or any(key in kind.model_fields for kind in kinds))
        ]
        if "kind" in node and foreign:
            for key in foreign:
                del node[key]
            keys = tuple(f"{dotted}.{key}" for key in sorted(foreign))
            text = f"{node['kind']} does not know {', '.join(keys)}; these keys of the config files are left out"
            yield Finding((f"{dotted}.kind", *keys), text)
        yield from drop_foreign_keys(fitting[0], node, typed, f"{dotted}.")


def _inside(typed: str, key: str) -> bool:
    return typed == key or typed.startswith(f"{key}.")


def _changes_kind(dotted: str, typed: Sequence[str]) -> bool:
    """Whether the user chose the group of this mapping, or its kind."""
    return bool({dotted.replace(".", "/"), f"{dotted}.kind"} & set(typed))
