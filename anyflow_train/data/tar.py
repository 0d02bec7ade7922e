"""Uncompressed tar files: what is where in one, and how to write one whose bytes depend on its contents alone."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

BLOCK = 512


@dataclass(frozen=True)
class Member:
    """A file inside of a tar: its name, and the place of its bytes."""

    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        """What the files of one sample share (WebDataset): the path up to the first dot of the last part."""
        path = PurePosixPath(self.name)
        return str(path.parent / path.name.split(".", 1)[0])

    @property
    def extension(self) -> str:
        """What follows that dot, in lower case."""
        return PurePosixPath(self.name).name.partition(".")[2].lower()


@dataclass(frozen=True)
class Listing:
    """The complete files of a tar, and what is wrong with it, if anything is."""

    members: tuple[Member, ...]
    problem: str | None


def scan(file: BinaryIO) -> Listing:
    """List a tar by its headers; a damaged or truncated tar gives the files before the damage."""
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
            # A tar cut between two files reads like a whole one; only the mark at its end tells.
            file.seek(archive.offset)
            if file.read(BLOCK) != bytes(BLOCK):
                problem = "it has no end mark: the file is truncated"
    except (tarfile.TarError, OSError, ValueError) as error:
        problem = str(error)
    return Listing(tuple(members), problem)


class TarWriter:
    """Appends files to a tar and says where their bytes are. No times, owners or modes: same contents, same bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def add(self, name: str, data: bytes) -> Member:
        """Append one file."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._file.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        offset = self._file.tell()
        self._file.write(data)
        self._file.write(bytes(-len(data) % BLOCK))
        return Member(name, offset, len(data))

    def finish(self) -> None:
        """Write the mark at the end."""
        self._file.write(bytes(2 * BLOCK))
