"""Files that appear whole or not at all, whatever dies in between; and locks of folders."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".tmp-"

EXPORT_MARKER = "anyflow_export.json"
"""In a folder that `anyflow export` made: where it comes from."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write to a hidden sibling that takes the name `path`, synced to disk, when the block ends without an error."""
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        with open(temporary, "wb") as file:
            yield file
            _sync(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that readers see either the old content or the new one, and after a power cut the new one."""
    with atomic_file(path) as file:
        file.write(content)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    replace_file(path, to_json(value))


def to_json(value: Any) -> bytes:
    """Readable JSON that depends on the value alone."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_synced(path: Path, *pieces: bytes | memoryview) -> str:
    """Write and flush to the disk, for files in a folder that takes its name when it is whole. Returns the sha256.

    Other threads run meanwhile: neither writing nor the checksum holds the interpreter.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
        _sync(file)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(lock: Callable[[int, int], None], descriptor: int, kind: int, folder: Path) -> bool:
    """Lock an open file of a folder, without waiting. The lock goes with the process, also where that is killed.

    A file system without locks gives a warning, and counts as locked.

    Args:
        lock: `fcntl.flock`, whose lock belongs to the open file and is inherited by forked processes, or
            `fcntl.lockf`, whose lock belongs to this process.
        kind: `fcntl.LOCK_EX` or `fcntl.LOCK_SH`.

    Returns:
        Whether it is locked; False where another process holds it.
    """
    try:
        lock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        print(f"warning: the file system of {folder} has no locks; do not start this twice", file=sys.stderr)
    return True


def file_sha256(path: Path) -> str:
    """Checksum of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
