"""Uncompressed tar files: listing their members, and writing them so that the bytes depend on the contents alone."""

from __future__ import annotations

import posixpath
import tarfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

BLOCK = 512


@dataclass(frozen=True)
class Member:
    """Position and number of a file's bytes in a tar. time: time of the file in seconds, as the tar says."""

    offset: int
    size: int
    time: int = 0


Samples = dict[str, dict[str, Member]]
"""WebDataset key -> extension -> file."""


def key_and_extension(name: str) -> tuple[str, str]:
    """Split a file's name as WebDataset does.

    Returns:
        Key, which the files of one sample share: the path up to the first dot of the file name; that of hidden files
        ends with a slash. And the part of the file name after that dot, in lower case.
    """
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.parent / stem) if stem else f"{path.parent}/", extension.lower()


@dataclass(frozen=True)
class _Bounded:
    """A file of `size` bytes whose reads never ask for more: the sizes in a damaged header may be anything."""

    file: BinaryIO
    size: int

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, offset: int) -> int:
        return self.file.seek(min(offset, self.size))

    def read(self, count: int) -> bytes:
        return self.file.read(max(0, min(count, self.size - self.file.tell())))


def scan(file: BinaryIO) -> tuple[Samples, str | None]:
    """List the complete files of a tar by its headers. A link to another file of the tar counts as that file.

    Returns:
        Files of each sample, of a damaged tar those before the damage; and the damage, or None if the tar is intact.
    """
    size = file.seek(0, 2)
    file.seek(0)
    samples: Samples = {}
    places: dict[str, Member] = {}
    links: list[tuple[str, str]] = []
    bounded: Any = _Bounded(file, size)
    try:
        with tarfile.open(fileobj=bounded, mode="r:") as archive:
            last = -1
            for info in archive:
                if archive.offset <= last:
                    raise ValueError("a header leads back to an earlier one")
                last = archive.offset
                if info.isfile() and 0 <= info.size <= size - info.offset_data:
                    places[info.name] = _add(samples, info.name, Member(info.offset_data, info.size, int(info.mtime)))
                elif info.islnk() or info.issym():
                    folder = "" if info.islnk() else posixpath.dirname(info.name)
                    links.append((info.name, posixpath.normpath(posixpath.join(folder, info.linkname))))
            for name, target in links:
                if target in places:
                    _add(samples, name, places[target])
            # A tar that was cut between two files reads like a complete one. Only the end mark shows the difference.
            file.seek(archive.offset)
            intact = file.read(BLOCK) == bytes(BLOCK)
            return samples, None if intact else "it has no end mark: the file is truncated"
    # The standard library lets the last three through: huge numbers, cut headers, and long chains of headers.
    except (tarfile.TarError, OSError, ValueError, OverflowError, IndexError, RecursionError) as error:
        return samples, str(error)


def _add(samples: Samples, name: str, member: Member) -> Member:
    key, extension = key_and_extension(name)
    samples.setdefault(key, {})[extension] = member
    return member


class TarWriter:
    """Writes a tar without times, owners and modes, so that equal contents give equal bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def add(self, name: str, data: bytes) -> Member:
        """Append one file. Returns the position of its bytes."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._file.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        offset = self._file.tell()
        self._file.write(data)
        self._file.write(bytes(-len(data) % BLOCK))
        return Member(offset, len(data))

    def finish(self) -> None:
        """Write the end mark."""
        self._file.write(bytes(2 * BLOCK))
