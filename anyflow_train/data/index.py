"""The index file of a shard: position and checksum of each sample's bytes in the tar."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import BaseModel, Field, ValidationError

from anyflow_train.data.tar import Member, scan
from anyflow_train.files import atomic_file

VERSION = 1
TENSORS = "safetensors"
CAPTIONS = ("json", "txt")


@dataclass(frozen=True)
class SampleEntry:
    """One sample of a shard.

    Attributes:
        key: name of the sample.
        offset, size: position and number of its safetensors bytes in the tar.
        crc32: checksum of those bytes; None if another program wrote the shard.
        caption_offset, caption_size: position and number of the caption file's bytes; size 0 if there is no caption.
    """

    key: str
    offset: int
    size: int
    crc32: int | None
    caption_offset: int
    caption_size: int


@dataclass(frozen=True)
class Skipped:
    """A clip that did not become a sample, and the reason."""

    key: str
    reason: str


@dataclass(frozen=True)
class ShardIndex:
    """Contents of one shard, the clips that were skipped, and the number of tokens of the longest text.

    cut: keys of the samples with a caption that was too long and lost its end.
    buckets: digit of each sample's bucket (see `data.manifest.ShardInfo`); empty if there is one bucket.
    """

    entries: tuple[SampleEntry, ...]
    skipped: tuple[Skipped, ...] = ()
    longest_text: int | None = None
    cut: tuple[str, ...] = ()
    buckets: str = ""


_Count = Annotated[int, Field(ge=0)]


class _Content(BaseModel):
    version: Literal[1]
    longest_text: _Count | None
    entries: list[tuple[str, _Count, _Count, _Count | None, _Count, _Count]]
    skipped: list[tuple[str, str]]
    cut: list[str] = []
    buckets: str = ""


def index_name(shard: str) -> str:
    """Return the name of a shard's index file: `shard-000000.tar` -> `shard-000000.index.json`."""
    return shard.removesuffix(".tar") + ".index.json"


def write_index(path: Path, index: ShardIndex) -> None:
    """Write an index file atomically, with one line per sample."""
    entries = ",\n".join(json.dumps(astuple(entry), ensure_ascii=False) for entry in index.entries)
    skipped = ",\n".join(json.dumps(astuple(entry), ensure_ascii=False) for entry in index.skipped)
    head = f'"version": {VERSION},\n"longest_text": {json.dumps(index.longest_text)}'
    head += f',\n"cut": {json.dumps(index.cut, ensure_ascii=False)}' if index.cut else ""
    head += f',\n"buckets": "{index.buckets}"' if index.buckets else ""
    text = f'{{{head},\n"entries": [\n{entries}\n],\n"skipped": [\n{skipped}\n]}}\n'
    with atomic_file(path) as file:
        file.write(text.encode())


def parse_index(data: bytes) -> ShardIndex:
    """Decode an index file. Raises ValueError if the bytes are not an index of this version."""
    try:
        content = _Content.model_validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"not a shard index of version {VERSION}: {first['loc']}: {first['msg']}") from None
    entries = tuple(SampleEntry(*entry) for entry in content.entries)
    skipped = tuple(Skipped(*entry) for entry in content.skipped)
    return ShardIndex(entries, skipped, content.longest_text, tuple(content.cut), content.buckets)


def build_index(file: BinaryIO) -> ShardIndex:
    """Make the index of a shard from its tar headers. It has no checksums."""
    entries = []
    for key, files in scan(file)[0].items():
        if tensors := files.get(TENSORS):
            caption = next((files[extension] for extension in CAPTIONS if extension in files), Member(0, 0))
            entries.append(SampleEntry(key, tensors.offset, tensors.size, None, caption.offset, caption.size))
    return ShardIndex(tuple(entries))
