"""Uncompressed tar files: listing their members, and writing them so that the bytes depend on the contents alone."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

BLOCK = 512


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name, and the position and number of its bytes."""

    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        """WebDataset key, which the files of one sample share: the path up to the first dot of the file name."""
        path = PurePosixPath(self.name)
        return str(path.parent / path.name.split(".", 1)[0])

    @property
    def extension(self) -> str:
        """Part of the file name after its first dot, in lower case."""
        return PurePosixPath(self.name).name.partition(".")[2].lower()


@dataclass(frozen=True)
class Listing:
    """Complete files of a tar, and its damage; None if it is intact."""

    members: tuple[Member, ...]
    problem: str | None


def scan(file: BinaryIO) -> Listing:
    """List a tar by its headers. Of a damaged or truncated tar, the files before the damage are listed."""
    file.seek(0, 2)
    size = file.tell()
    file.seek(0)
    members: list[Member] = []
    problem = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                if info.isfile() and info.offset_data + info.size <= size:
                    members.append(Member(info.name, info.offset_data, info.size))
            # A tar that was cut between two files reads like a complete one. Only the end mark shows the difference.
            file.seek(archive.offset)
            if file.read(BLOCK) != bytes(BLOCK):
                problem = "it has no end mark: the file is truncated"
    except (tarfile.TarError, OSError, ValueError) as error:
        problem = str(error)
    return Listing(tuple(members), problem)


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
        return Member(name, offset, len(data))

    def finish(self) -> None:
        """Write the end mark."""
        self._file.write(bytes(2 * BLOCK))
