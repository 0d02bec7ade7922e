"""Writing of one shard: a WebDataset tar of `KEY.safetensors` and `KEY.json`, and its index."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save

from anyflow_train.data.index import SampleEntry, ShardIndex, Skipped, index_name, parse_index, write_index
from anyflow_train.data.shards import Sample
from anyflow_train.data.tar import TarWriter
from anyflow_train.files import atomic_file, open_inside, read_inside


def write_shard(
    folder: Path, name: str, outcomes: Iterable[Sample | Skipped], cut: frozenset[str] = frozenset()
) -> ShardIndex:
    """Write the samples in their order. A skipped clip appears in the index only.

    The tar appears when it is complete, and the index after it. A shard is complete if and only if it has an index.

    Args:
        folder: folder of the shards.
        name: name of the tar.
        outcomes: samples, and clips that were skipped.
        cut: keys of clips with a caption that was cut.
    """
    entries: list[SampleEntry] = []
    skipped: list[Skipped] = []
    longest = 0
    with atomic_file(folder / name) as file:
        tar = TarWriter(file)
        for outcome in outcomes:
            if isinstance(outcome, Skipped):
                skipped.append(outcome)
            else:
                entries.append(_add(tar, outcome))
                longest = max(longest, len(outcome.text), *(len(text) for text, _ in outcome.others))
        tar.finish()
    index = ShardIndex(
        tuple(entries), tuple(skipped), longest, tuple(entry.key for entry in entries if entry.key in cut)
    )
    write_index(folder / index_name(name), index)
    return index


def copy_shard(folder: Path, name: str, origin: str, keys: frozenset[str]) -> None:
    """Write a shard of some of the samples of another one, with the same bytes, and with its skipped clips.

    Args:
        folder: folder of both shards.
        name: name of the new tar.
        origin: name of the other tar.
        keys: keys of the samples and skipped clips to copy.
    """
    index = parse_index(read_inside(folder, index_name(origin)))
    entries: list[SampleEntry] = []
    with os.fdopen(open_inside(folder, origin), "rb") as source, atomic_file(folder / name) as file:
        tar = TarWriter(file)
        for entry in (entry for entry in index.entries if entry.key in keys):
            data, caption = (
                os.pread(source.fileno(), size, offset)
                for size, offset in ((entry.size, entry.offset), (entry.caption_size, entry.caption_offset))
            )
            first, second = tar.add(f"{entry.key}.safetensors", data), tar.add(f"{entry.key}.json", caption)
            entries.append(replace(entry, offset=first.offset, caption_offset=second.offset))
        tar.finish()
    skipped = tuple(one for one in index.skipped if one.key in keys)
    cut = tuple(key for key in index.cut if key in keys)
    write_index(folder / index_name(name), replace(index, entries=tuple(entries), skipped=skipped, cut=cut))


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
