"""The sidecar of a shard: where each sample's bytes are in the tar, and their checksums."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

from anyflow_train.data.tar import scan
from anyflow_train.files import atomic_file

VERSION = 1
TENSORS = "safetensors"
CAPTIONS = ("json", "txt")


@dataclass(frozen=True)
class SampleEntry:
    """One sample of a shard.

    Attributes:
        key: the sample's name.
        offset, size: the place of its safetensors bytes in the tar.
        crc32: of those bytes; None for a shard that was written elsewhere.
        caption_offset, caption_size: the place of its caption file; size 0 if there is none.
    """

    key: str
    offset: int
    size: int
    crc32: int | None
    caption_offset: int
    caption_size: int


@dataclass(frozen=True)
class Skipped:
    """A clip that did not become a sample, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class ShardIndex:
    """The contents of one shard, what was left out when it was made, and the tokens of its longest text."""

    entries: tuple[SampleEntry, ...]
    skipped: tuple[Skipped, ...] = ()
    longest_text: int | None = None


def index_name(shard: str) -> str:
    """The sidecar's file name: `shard-000000.tar` -> `shard-000000.index.json`."""
    return shard.removesuffix(".tar") + ".index.json"


def write_index(path: Path, index: ShardIndex) -> None:
    """Write the sidecar atomically, one line a sample."""
    entries = ",\n".join(json.dumps(astuple(entry), ensure_ascii=False) for entry in index.entries)
    skipped = ",\n".join(json.dumps(astuple(entry), ensure_ascii=False) for entry in index.skipped)
    head = f'"version": {VERSION},\n"longest_text": {json.dumps(index.longest_text)}'
    text = f'{{{head},\n"entries": [\n{entries}\n],\n"skipped": [\n{skipped}\n]}}\n'
    with atomic_file(path) as file:
        file.write(text.encode())


def parse_index(data: bytes) -> ShardIndex:
    """Read a sidecar's bytes. Raises ValueError if they are not one."""
    try:
        content = json.loads(data)
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, this program reads {VERSION}")
        entries = tuple(SampleEntry(*entry) for entry in content["entries"])
        skipped = tuple(Skipped(*entry) for entry in content["skipped"])
        return ShardIndex(entries, skipped, content["longest_text"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a shard index: {error!r}") from error


def build_index(file: BinaryIO) -> ShardIndex:
    """The index of a shard that came without one, from its tar headers; without checksums."""
    tensors, captions = {}, {}
    for member in scan(file).members:
        if member.extension == TENSORS:
            tensors[member.key] = member
        elif member.extension in CAPTIONS:
            captions[member.key] = member
    entries = []
    for key, member in tensors.items():
        caption = captions.get(key)
        place = (caption.offset, caption.size) if caption else (0, 0)
        entries.append(SampleEntry(key, member.offset, member.size, None, *place))
    return ShardIndex(tuple(entries))
