"""`config.json` of a run or a checkpoint: the resolved config and its format version.

Only a resumed run decodes it, to compare it with the current config. Code that loads a trained network reads
`network_file.NetworkFile` instead, so that unrelated keys cannot make a network unreadable.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError

FORMAT = 2
RENAMES: Mapping[int, Mapping[str, str]] = {2: RunConfig.renamed}
"""Format -> {old dotted key: new dotted key}, for the keys that this format renamed. A key may name a whole group.

To rename a key, add an entry under `FORMAT + 1` and increase `FORMAT`.
"""


def saved_config(config: RunConfig) -> dict[str, Any]:
    """Content of `config.json`."""
    return {"format": FORMAT, **config.model_dump(mode="json")}


def under_new_names(saved: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Apply all renames to a saved config, without decoding it.

    Args:
        saved: content of `config.json`; without a `format` it has format 1.
        where: file or folder that it was read from, for errors.

    Raises:
        UserError: a newer version wrote it.
    """
    content = copy.deepcopy(dict(saved))
    written = content.pop("format", 1)
    if not isinstance(written, int):
        raise UserError(where, f"has a config of format {written!r}, which is not a number")
    if written > FORMAT:
        raise UserError(where, f"has a config of format {written}; this version of anyflow_train reads up to {FORMAT}")
    for number in sorted(RENAMES):
        for old, new in RENAMES[number].items() if number > written else ():
            _rename(content, old.split("."), new.split("."))
    return content


def decode_saved(saved: Mapping[str, Any], where: str) -> RunConfig:
    """Decode a saved config.

    Raises:
        UserError: it has a key or a value that this version does not support.
    """
    content = under_new_names(saved, where)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        advice = "load it with the version that wrote it or choose another name"
        raise UserError(
            where, f"its config says {first_key(error)}, which this version cannot read; {advice}"
        ) from None


def first_key(error: ValidationError) -> str:
    """Dotted key of the first problem."""
    return ".".join(map(str, error.errors(include_url=False)[0]["loc"]))


def _rename(content: dict[str, Any], old: list[str], new: list[str]) -> None:
    node: Any = content
    for part in old[:-1]:
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or old[-1] not in node:
        return
    value = node.pop(old[-1])
    node = content
    for part in new[:-1]:
        node = node.setdefault(part, {})
    node[new[-1]] = value
