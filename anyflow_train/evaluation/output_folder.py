"""The folder for the results of a command: checked before the work, and never shared with results of another model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from anyflow_train.errors import UserError
from anyflow_train.files import check_writable, read_json, write_json


def check_results(out: Path, index: str, owner: Mapping[str, Any], names: Iterable[str]) -> None:
    """Check that a folder is free for results, or holds earlier ones of the same owner.

    Args:
        index: JSON file of the results, with the keys of `owner` in it.
        owner: facts that tell results of different models apart.
        names: files that will be written.

    Raises:
        UserError: the folder cannot be written, holds results of another owner, or files that would be overwritten.
    """
    check_writable(out)
    if (out / index).exists():
        before = _read(out / index)
        different = [key for key, value in owner.items() if before.get(key) != value]
        if different:
            found = f"{different[0]} = {before.get(different[0])!r}, and this is {owner[different[0]]!r}"
            raise UserError("out", f"'{out}' holds results with {found}; name another folder")
    elif taken := sorted(name for name in names if (out / name).exists()):
        raise UserError("out", f"'{out}' holds '{taken[0]}' of another origin; name another folder")


def begin_results(out: Path, index: str, owner: Mapping[str, Any]) -> None:
    """Make the folder and note the owner, so that it can continue after an interruption."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / index).exists():
        write_json(out / index, owner)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise UserError("out", f"'{path}' cannot be read ({error}); remove it or name another folder") from None
