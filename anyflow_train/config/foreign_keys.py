"""Drop keys that a config file sets for a different kind than the chosen one, with a warning.

For example, `experiment=tiny objective=flow_matching` works although the experiment sets keys of the flow map. A key
that the user typed, or that no kind knows, is still an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from anyflow_train.config.base import Model
from anyflow_train.config.findings import Finding
from anyflow_train.config.keys import chosen, variants
from anyflow_train.text import is_within


def drop_foreign_keys(
    model: type[Model], values: dict[str, Any], typed: Sequence[str], prefix: str = ""
) -> Iterator[Finding]:
    """Remove foreign keys from nested `values` in place. Yield one finding for each mapping that had some.

    Args:
        typed: keys and groups as the user wrote them.
        prefix: prefix of the dotted keys of `values`.
    """
    for name, field in model.model_fields.items():
        node, kinds, dotted = values.get(name), variants(field.annotation), f"{prefix}{name}"
        if not isinstance(node, dict) or not kinds:
            continue
        fitting = chosen(kinds, node)
        if len(fitting) > 1:  # no kind matches: `decode` reports that
            continue
        foreign = [
            key
            for key in node.keys() - fitting[0].model_fields.keys()
            if not any(is_within(one, [f"{dotted}.{key}"]) for one in typed)
            and (_changes_kind(dotted, typed) or any(key in kind.model_fields for kind in kinds))
        ]
        if "kind" in node and foreign:
            for key in foreign:
                del node[key]
            keys = tuple(f"{dotted}.{key}" for key in sorted(foreign))
            text = f"{node['kind']} does not have {', '.join(keys)}; these keys of the config files are ignored"
            yield Finding((f"{dotted}.kind", *keys), text)
        yield from drop_foreign_keys(fitting[0], node, typed, f"{dotted}.")


def _changes_kind(dotted: str, typed: Sequence[str]) -> bool:
    """Whether the user chose the group or the kind of this mapping."""
    return bool({dotted.replace(".", "/"), f"{dotted}.kind"} & set(typed))
