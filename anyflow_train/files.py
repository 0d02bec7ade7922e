"""Atomic file writes, locks on folders, and reading of files that others wrote."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import StringConstraints

from anyflow_train.errors import UserError

TEMPORARY = ".tmp-"

EXPORT_MARKER = "anyflow_export.json"
"""File in an exported folder that records its origin."""

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,=+-]{0,199}$")]
"""Name of a file inside a folder: no separator, no leading dot or dash, and no character that a shell interprets."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write to a hidden file next to `path`; sync and rename it to `path` if the block ends without an error."""
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        # Without following a link that somebody may have left under the temporary name.
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666)) as file:
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


def existing_part(path: Path) -> Path:
    """Return the path, or the nearest path above it that exists. A link exists even if it leads nowhere."""
    # Unlike `Path.exists`, this does not raise below a folder that may not be entered.
    return next(part for part in (path.absolute(), *path.absolute().parents) if os.path.lexists(part))


def check_writable(out: Path) -> None:
    """Check that a folder can be written, or made. Nothing is left there.

    Raises:
        UserError: it is not a folder, or cannot be written.
    """
    existing = existing_part(out)
    try:
        with tempfile.TemporaryFile(dir=existing):  # `os.access` does not know all file systems, such as /proc
            pass
    except OSError as error:
        problem = f"cannot be written: '{existing}' is no folder with write access ({error.strerror}); name another"
        raise UserError("out", f"'{out}' {problem}") from None


def networks_inside(folder: Path, *marks: str) -> str:
    """Name a folder inside that holds one of `marks`, for a message about a folder that is no network itself."""
    found = [path.parent for mark in marks for path in sorted(folder.glob(f"*/{mark}"))]
    return f"; name a folder inside, such as {found[-1]}" if found else ""


def check_own(out: Path, mark: str, index: str, *others: str) -> None:
    """Check that results can be written into a folder without replacing files of another origin.

    Args:
        mark: text in every file `index` that the command wrote. If it is there, all files belong to the command.
        index: name of the first file that the command writes.
        others: names of its other files.

    Raises:
        UserError: the folder cannot be written, or one of the files exists and the command did not write it.
    """
    check_writable(out)
    if (out / index).is_file() and mark.encode() in (out / index).read_bytes():
        return
    for name in (index, *others):
        if os.path.lexists(out / name):
            raise UserError("out", f"'{out / name}' exists, and this command did not write it; give another out")


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
        before = _read_results(out / index)
        different = [key for key, value in owner.items() if before.get(key) != value]
        if different:
            found = f"{different[0]} = {before.get(different[0])!r}, and this is {owner[different[0]]!r}"
            raise UserError("out", f"'{out / index}' holds results with {found}; name another folder")
    elif taken := sorted(name for name in names if (out / name).exists()):
        raise UserError("out", f"'{out}' holds '{taken[0]}' of another origin; name another folder")


def begin_results(out: Path, index: str, owner: Mapping[str, Any]) -> None:
    """Make the folder and note the owner, so that it can continue after an interruption."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / index).exists():
        write_json(out / index, owner)


def inside(folder: Path, name: str) -> Path:
    """Return the path of a folder's file, with links resolved.

    Links may lead to another place of the folder. In a snapshot of the hub's cache they lead to the cache's blobs.

    Raises:
        OSError: the name or a link leads out of the folder.
    """
    root = folder.resolve()
    path = (root / name).resolve()
    blobs = [place.parent / "blobs" for place in root.parents if place.name == "snapshots"]
    if not any(path.is_relative_to(home) for home in (root, *blobs)):
        raise OSError(errno.EPERM, "leads out of its folder; put a copy of the file there", str(folder / name))
    return path


def regular(path: Path) -> Path:
    """Return the path of a regular file. Raises OSError for a folder, a FIFO or a device, which is not opened."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return path


def open_inside(folder: Path, name: str) -> int:
    """Open a regular file for reading, by its name in a folder. The caller closes the descriptor.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is a link that leads out of the folder.
    """
    path = folder / name
    # O_NONBLOCK: if a FIFO takes the file's place in the meantime, the call returns all the same.
    return os.open(regular(inside(folder, name) if path.is_symlink() else path), os.O_RDONLY | os.O_NONBLOCK)


def read_inside(folder: Path, name: str) -> bytes:
    """Read a file as `open_inside` opens it. Raises OSError."""
    with os.fdopen(open_inside(folder, name), "rb") as file:
        return file.read()


def parse_json(data: str | bytes) -> Any:
    """Decode JSON. Raises ValueError also for JSON that is nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def read_json(path: Path) -> Any:
    """Read JSON from a regular file. Raises OSError or ValueError."""
    return parse_json(regular(path).read_bytes())


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing or damaged, or holds anything else."""
    with suppress(OSError, ValueError):
        content = read_json(path)
        return content if isinstance(content, dict) else {}
    return {}


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Iterate over the objects of a file with one JSON object per line. Damaged lines are left out.

    A killed process may leave half a line. A file that does not exist has no lines.
    """
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                with suppress(ValueError):
                    if isinstance(row := parse_json(line), dict):
                        yield row


def file_sha256(path: Path) -> str:
    """Compute the checksum of a file as `open_inside` opens it, read in pieces. Raises OSError."""
    with os.fdopen(open_inside(path.parent, path.name), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read_results(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise UserError("out", f"'{path}' cannot be read ({error}); remove it or name another folder") from None
