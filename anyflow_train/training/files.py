"""Files that are whole or absent, whatever dies in between."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_synced(path: Path, content: bytes) -> str:
    """Write and flush to the disk. Returns the content's sha256."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that readers see either the old content or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_synced(temporary, content)
    temporary.replace(path)
    sync_folder(path.parent)


def to_json(value: Any) -> bytes:
    """Readable JSON that depends on the value alone."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def file_sha256(path: Path) -> str:
    """Checksum of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
