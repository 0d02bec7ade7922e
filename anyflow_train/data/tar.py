"""Uncompressed tar files: listing their members, and writing them so that the bytes depend on the contents alone."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

BLOCK = 512


@dataclass(frozen=True)
class Member:
    """Position and number of a file's bytes in a tar."""

    offset: int
    size: int


Samples = dict[str, dict[str, Member]]
"""WebDataset key -> extension -> file."""


def key_and_extension(name: str) -> tuple[str, str]:
    """Split a file's name as WebDataset does.

    Returns:
        Key, which the files of one sample share: the path up to the first dot of the file name. And the part of the
        file name after that dot, in lower case.
    """
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.parent / stem), extension.lower()


def scan(file: BinaryIO) -> tuple[Samples, str | None]:
    """List the complete files of a tar by its headers.

    Returns:
        Files of each sample, of a damaged tar those before the damage; and the damage, or None if the tar is intact.
    """
    size = file.seek(0, 2)
    file.seek(0)
    samples: Samples = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                if info.isfile() and info.offset_data + info.size <= size:
                    key, extension = key_and_extension(info.name)
                    samples.setdefault(key, {})[extension] = Member(info.offset_data, info.size)
            # A tar that was cut between two files reads like a complete one. Only the end mark shows the difference.
            file.seek(archive.offset)
            intact = file.read(BLOCK) == bytes(BLOCK)
            return samples, None if intact else "it has no end mark: the file is truncated"
    except (tarfile.TarError, OSError, ValueError) as error:
        return samples, str(error)


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
