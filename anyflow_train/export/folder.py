"""The folder of an export. It appears only when it is complete, and never replaces files of others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anyflow_train import __version__
from anyflow_train.errors import UserError
from anyflow_train.files import EXPORT_MARKER as MARKER
from anyflow_train.files import check_writable as check_parent
from anyflow_train.files import read_json, write_json


@contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden temporary folder. It gets the name `out` at the end, and is deleted if an error occurs.

    Args:
        out: the folder to make. It may exist if it is empty, or if it is an earlier export and `overwrite` is set.
        overwrite: whether an earlier export may be replaced.

    Raises:
        UserError: `out` must not be written.
    """
    check_writable(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    building = out.with_name(f".{out.name}.building-{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        yield building
        _open_as_the_folder(building)
        check_writable(out, overwrite)
        _replace(out, building)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def check_writable(out: Path, overwrite: bool) -> None:
    """Check that an export may write to a folder.

    Raises:
        UserError: `out` cannot be written, is a file, holds files that no export wrote, or holds an export and
            `overwrite` is not set.
    """
    check_parent(out.parent)
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise UserError("out", f"'{out}' is not a folder; name a new one")
    found = _files(out)
    if not found:
        return
    written = _written_files(out)
    if written is None:
        raise UserError("out", f"'{out}' holds files that no export made; name a new folder")
    foreign = sorted(found - written - {MARKER})
    if foreign:
        raise UserError("out", f"'{out}' holds '{foreign[0]}', which the export did not make; name a new folder")
    if not overwrite:
        raise UserError("out", f"'{out}' holds an earlier export; name a new folder, or set overwrite=true")


def write_marker(folder: Path, provenance: dict[str, Any]) -> None:
    """Write the marker file with the origin of the export and the names of its files. It is written last."""
    made_by = {"package": "anyflow_train", "version": __version__}
    write_json(folder / MARKER, {**made_by, **provenance, "files": sorted(_files(folder))})


def _written_files(folder: Path) -> set[str] | None:
    """Read the names of files from an export's marker; None if there is no marker."""
    try:
        marker = read_json(folder / MARKER)
        return set(marker["files"]) if marker["package"] == "anyflow_train" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _open_as_the_folder(building: Path) -> None:
    """Give the files the permissions of the folder. safetensors writes files that only their owner can read."""
    mode = building.stat().st_mode & 0o666
    for name in _files(building):
        (building / name).chmod(mode)


def _replace(out: Path, building: Path) -> None:
    """Rename `building` to `out`. While an earlier export is replaced, `out` may be missing but is never incomplete."""
    if not out.exists():
        building.rename(out)
        return
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    out.rename(old)
    building.rename(out)
    shutil.rmtree(old)
