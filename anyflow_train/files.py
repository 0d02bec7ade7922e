"""Atomic file writes, and locks on folders."""

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
"""File in an exported folder that records its origin."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write to a hidden file next to `path`; sync and rename it to `path` if the block ends without an error."""
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
    """Replace a file atomically. Readers see the old or the new content; the new one survives a power cut."""
    with atomic_file(path) as file:
        file.write(content)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    replace_file(path, to_json(value))


def to_json(value: Any) -> bytes:
    """Format readable JSON with sorted keys, so that equal values give equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_synced(path: Path, *pieces: bytes | memoryview) -> str:
    """Write a file, sync it to disk and return its sha256; for files in a folder that is renamed once complete.

    Writing and hashing release the interpreter lock, so that other threads can run.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
        _sync(file)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries (names, renames) to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(lock: Callable[[int, int], None], descriptor: int, kind: int, folder: Path) -> bool:
    """Lock an open file of a folder without waiting. The lock ends with the process, even if the process is killed.

    On a file system without locks, print a warning and return True.

    Args:
        lock: `fcntl.flock`, whose lock belongs to the open file and is inherited by forked processes, or
            `fcntl.lockf`, whose lock belongs to this process.
        descriptor: descriptor of the open file.
        kind: `fcntl.LOCK_EX` or `fcntl.LOCK_SH`.

    Returns:
        True if the file is now locked; False if another process holds the lock.
    """
    try:
        lock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        print(f"warning: the file system of {folder} does not support locks; start this only once", file=sys.stderr)
    return True


def file_sha256(path: Path) -> str:
    """Compute the checksum of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
