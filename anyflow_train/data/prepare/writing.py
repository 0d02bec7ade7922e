"""Writing of one shard: a WebDataset tar of `KEY.safetensors` and `KEY.json`, and its index."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path

from safetensors.torch import save

from anyflow_train.data.index import SampleEntry, ShardIndex, Skipped, index_name, parse_index, write_index
from anyflow_train.data.manifest import DIGITS, ShardInfo
from anyflow_train.data.prepare.windows import clip_of
from anyflow_train.data.shards import Sample
from anyflow_train.data.tar import TarWriter
from anyflow_train.files import atomic_file, file_sha256, open_inside, read_inside


def write_shard(
    folder: Path,
    name: str,
    outcomes: Iterable[Sample | Skipped],
    cut: frozenset[str] = frozenset(),
    shapes: Sequence[tuple[int, ...]] = (),
) -> ShardIndex:
    """Write the samples in their order. A skipped clip appears in the index only.

    The tar appears when it is complete, and the index after it. A shard is complete if and only if it has an index.

    Args:
        folder: folder of the shards.
        name: name of the tar.
        outcomes: samples, and clips that were skipped.
        cut: keys of clips with a caption that was cut.
        shapes: shapes of latents (F, C, H, W) of the buckets, if there are several.
    """
    entries: list[SampleEntry] = []
    skipped: list[Skipped] = []
    longest, buckets = 0, ""
    with atomic_file(folder / name) as file:
        tar = TarWriter(file)
        for outcome in outcomes:
            if isinstance(outcome, Skipped):
                skipped.append(outcome)
            else:
                entries.append(_add(tar, outcome))
                if shapes and outcome.latents is not None:
                    buckets += DIGITS[shapes.index(tuple(outcome.latents.shape))]
                longest = max(longest, len(outcome.text), *(len(text) for text, _ in outcome.others))
        tar.finish()
    index = ShardIndex(
        tuple(entries),
        tuple(skipped),
        longest,
        tuple(entry.key for entry in entries if clip_of(entry.key) in cut),
        buckets,
    )
    write_index(folder / index_name(name), index)
    return index


def describe_shard(folder: Path, name: str, index: ShardIndex) -> ShardInfo:
    """Describe a shard that is complete, for the manifest."""
    size, checksum = (folder / name).stat().st_size, file_sha256(folder / index_name(name))
    return ShardInfo(name=name, samples=len(index.entries), bytes=size, index_sha256=checksum, buckets=index.buckets)


def copy_shard(folder: Path, name: str, origin: str, keys: frozenset[str]) -> None:
    """Write a shard of the samples of some clips of another one, with the same bytes, and with its skipped clips.

    Args:
        folder: folder of both shards.
        name: name of the new tar.
        origin: name of the other tar.
        keys: keys of the clips to copy.
    """
    index = parse_index(read_inside(folder, index_name(origin)))
    entries: list[SampleEntry] = []
    kept = [clip_of(entry.key) in keys for entry in index.entries]
    with os.fdopen(open_inside(folder, origin), "rb") as source, atomic_file(folder / name) as file:
        tar = TarWriter(file)
        for entry in compress(index.entries, kept):
            data, caption = (
                os.pread(source.fileno(), size, offset)
                for size, offset in ((entry.size, entry.offset), (entry.caption_size, entry.caption_offset))
            )
            first, second = tar.add(f"{entry.key}.safetensors", data), tar.add(f"{entry.key}.json", caption)
            entries.append(replace(entry, offset=first.offset, caption_offset=second.offset))
        tar.finish()
    skipped = tuple(one for one in index.skipped if clip_of(one.key) in keys)
    cut, buckets = tuple(key for key in index.cut if clip_of(key) in keys), "".join(compress(index.buckets, kept))
    index = ShardIndex(tuple(entries), skipped, index.longest_text, cut, buckets)
    write_index(folder / index_name(name), index)


def _add(tar: TarWriter, sample: Sample) -> SampleEntry:
    tensors = {"text": sample.text.contiguous()}
    if sample.latents is not None:
        tensors["latents"] = sample.latents.contiguous()
    tensors |= {f"text.{number}": text.contiguous() for number, (text, _) in enumerate(sample.others, start=1)}
    data = save(tensors)
    facts: dict[str, object] = {"key": sample.key, "caption": sample.caption}
    if sample.others:
        facts["captions"] = [sample.caption, *(caption for _, caption in sample.others)]
    caption = json.dumps(facts, ensure_ascii=False).encode()
    tensor_file = tar.add(f"{sample.key}.safetensors", data)
    caption_file = tar.add(f"{sample.key}.json", caption)
    return SampleEntry(
        sample.key, tensor_file.offset, tensor_file.size, zlib.crc32(data), caption_file.offset, caption_file.size
    )
