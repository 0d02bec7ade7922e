"""Random access to the samples of a shard folder, straight from their bytes in the tars."""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from anyflow_train.config.base import ClipSize
from anyflow_train.config.run import Data
from anyflow_train.data.captions import parse_captions
from anyflow_train.data.index import SampleEntry, ShardIndex, build_index, index_name, parse_index, write_index
from anyflow_train.data.manifest import MANIFEST, Manifest, PromptTexts, parse_manifest, parse_prompt_texts
from anyflow_train.data.remote import LocalFolder, RemoteFolder, is_remote, public_location
from anyflow_train.errors import UserError
from anyflow_train.text import GIB, printable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEFAULT_CACHE = Path("~/.cache/anyflow_train/shards")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
        key: name of the sample.
        latents: (F, C, H, W), normalised, in the dtype of the shards; None for prompts without video.
        text: (L, D) embedding, valid tokens only, in the dtype of the shards.
        caption: the text itself; empty if the shard does not contain it.
        others: further texts for the same latents, and their captions.
    """

    key: str
    latents: Tensor | None
    text: Tensor
    caption: str
    others: tuple[tuple[Tensor, str], ...] = ()

    def with_caption(self, number: int) -> Sample:
        """Return the sample with one of its n captions, the one of `number` modulo n, as its only one."""
        text, caption = [(self.text, self.caption), *self.others][number % (1 + len(self.others))]
        return replace(self, text=text, caption=caption, others=())


class BadSampleError(Exception):
    """A sample cannot be used. Names the shard, the sample and the reason, with control characters escaped."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        self.shard, self.key, self.reason = map(printable, (shard, key, reason))
        super().__init__(f"{self.shard}: {self.key}: {self.reason}")


@dataclass
class ShardSet:
    """The shards of a folder or URL as one sequence of samples. Several threads may read at once.

    Attributes:
        location: folder or URL, without secrets: for messages.
        folder: reads the files.
        manifest: description of the shards.
        texts: embeddings of the negative prompt and of the validation prompts.
        generations: number of states that the folder has had.
        bucket: number of the bucket whose samples these are; None takes all samples.
    """

    location: str
    folder: LocalFolder | RemoteFolder
    manifest: Manifest
    texts: PromptTexts
    generations: int = 1
    bucket: int | None = None

    def __post_init__(self) -> None:
        self._places: dict[int, list[int]] = {}
        self._starts = (0, *accumulate(self.shard_sizes))
        self._indices: dict[int, ShardIndex] = {}

    @classmethod
    def open(
        cls, location: str, cache: str | None = None, cache_gib: float = 100.0, generation: int | None = None
    ) -> ShardSet:
        """Open a folder, a URL prefix, or a URL with `{}` for the file's name.

        If there are several buckets, this opens the first one that has samples.

        Args:
            location: folder or URL.
            cache: folder for copies of remote shards; None uses a folder in the user's cache.
            cache_gib: largest size of the copies in GiB.
            generation: state of a folder that has grown, counted from 0; None takes the newest one.

        Raises:
            UserError: the manifest or the prompts' embeddings cannot be read, or there are no samples.
        """
        root = Path(cache or DEFAULT_CACHE).expanduser()
        remote = RemoteFolder(location, root, int(cache_gib * GIB), "") if is_remote(location) else None
        folder = remote or LocalFolder(Path(location).expanduser())
        version, location = location.encode(), public_location(location)
        data = _read(folder, location, MANIFEST)
        grown = parse_manifest(data, f"{location}/{MANIFEST}")
        manifest = grown.at(generation)
        if remote:
            remote.version = hashlib.sha256(version + data).hexdigest()[:16]
        texts = parse_prompt_texts(_read(folder, location, manifest.text), manifest, f"{location}/{manifest.text}")
        if manifest.samples == 0:
            raise UserError(location, "the shards contain no samples; run `anyflow prepare` again")
        shards = cls(location, folder, manifest, texts, grown.generations)
        filled = [size for size, count in manifest.counts.items() if count]
        return shards.of_size(filled[0]) if filled else shards

    @property
    def _shapes(self) -> list[object]:
        every = self.manifest.buckets if self.bucket is None else ()
        return [one.latent_shape for one in every] or [self.manifest.latent_shape]

    def of_size(self, size: ClipSize) -> ShardSet:
        """Return the samples of a size, one of `manifest.clip_sizes`."""
        number = self.manifest.clip_sizes.index(size) if self.manifest.buckets else None
        return replace(self, manifest=self.manifest.of(number), bucket=number)

    def of_all_sizes(self) -> ShardSet:
        """Return all samples, whose latents may differ in shape."""
        return replace(self, bucket=None)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples per shard, in the order of their indices."""
        sizes = self.manifest.sizes
        return sizes if self.bucket is None else tuple(len(self._of_bucket(number)) for number in range(len(sizes)))

    def read(self, index: int) -> Sample:
        """Read the sample with an index in [0, len). Raises BadSampleError if it cannot be used."""
        entry, (number, _) = self.entry(index), self._locate(index)
        try:
            with self._open(number) as file:
                data = _read_part(file, entry.offset, entry.size)
                caption = _read_part(file, entry.caption_offset, entry.caption_size)
            return self._decode(entry, data, caption)
        except (OSError, ValueError, SafetensorError) as error:
            raise BadSampleError(self.manifest.shards[number].name, entry.key, str(error)) from error

    def entry(self, index: int) -> SampleEntry:
        """Return the index entry of the sample with an index in [0, len). Raises BadSampleError if there is none."""
        number, place = self._locate(index)
        try:
            return self._index(number).entries[place]
        except (OSError, ValueError, IndexError) as error:
            problem = "the shard ends before it" if isinstance(error, IndexError) else str(error)
            raise BadSampleError(self.manifest.shards[number].name, f"sample {place}", problem) from error

    def key(self, index: int) -> str:
        """Return the name of a sample, printable. Raises BadSampleError, as `entry` does."""
        return printable(self.entry(index).key)

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the number of a sample's shard, and its place there, past those that are dropped."""
        number = bisect_right(self._starts, index) - 1
        place = index - self._starts[number]
        if self.bucket is not None:
            return number, self._of_bucket(number)[place]
        for start, end in self.manifest.dropped.get(self.manifest.shards[number].name, ()):
            place += end - start if place >= start else 0
        return number, place

    def _of_bucket(self, number: int) -> list[int]:
        """List the places of the bucket's samples in a shard."""
        if number not in self._places:
            self._places[number] = self.manifest.places(number, self.bucket or 0)
        return self._places[number]

    def cancel(self) -> None:
        """Stop remote copies that are in progress in other threads."""
        self.folder.cancel()

    def _open(self, number: int) -> BinaryIO:
        shard = self.manifest.shards[number]
        return os.fdopen(self.folder.open(shard.name, shard.bytes), "rb")

    def _decode(self, entry: SampleEntry, data: bytes, caption: bytes) -> Sample:
        if entry.crc32 is not None and zlib.crc32(data) != entry.crc32:
            raise ValueError("the bytes do not match the checksum")
        tensors = _load(data)
        text = tensors.get("text")
        if text is None or text.ndim != 2 or text.shape[1] != self.manifest.text_dim:
            raise ValueError(f"the text is {_shape(text)}, but the manifest says (L, {self.manifest.text_dim})")
        latents = tensors.get("latents")
        if self.manifest.kind == "video" and (latents is None or tuple(latents.shape) not in self._shapes):
            shapes = " or ".join(map(str, self._shapes))
            raise ValueError(f"the latents are {_shape(latents)}, but the manifest says {shapes}")
        more = [tensors[name] for name in map("text.{}".format, range(1, len(tensors))) if name in tensors]
        for other in more:
            if other.ndim != 2 or other.shape[1] != text.shape[1]:
                raise ValueError(f"a text is {_shape(other)}, but the manifest says (L, {self.manifest.text_dim})")
        for tensor in (latents, text, *more):
            if tensor is not None and tensor.dtype not in DTYPES:
                raise ValueError(f"it contains numbers of type {tensor.dtype}")
            if tensor is not None and not _finite(tensor):
                raise ValueError("it contains non-finite numbers")
        first, *captions = parse_captions(caption)
        # A text without its caption gets an empty one; a caption without its text cannot be used.
        captions = [*captions, *[""] * len(more)][: len(more)]
        return Sample(entry.key, latents, text, first, tuple(zip(more, captions, strict=True)))

    def _index(self, number: int) -> ShardIndex:
        if number not in self._indices:
            self._indices[number] = self._load_index(number)
        return self._indices[number]

    def _load_index(self, number: int) -> ShardIndex:
        shard = self.manifest.shards[number]
        try:
            data = self.folder.read_bytes(index_name(shard.name))
            index = parse_index(data)
        except (OSError, ValueError) as error:
            log.info("%s: no usable index (%s); making one from the tar headers", shard.name, error)
        else:
            if shard.index_sha256 not in (None, hashlib.sha256(data).hexdigest()):
                raise ValueError("the index is not the one that the manifest was written with; copy the shards again")
            return index
        with self._open(number) as file:
            index = build_index(file)
        known = shard.index_sha256 is not None  # then a file without the samples' checksums must not take its place
        if not known and isinstance(self.folder, LocalFolder) and len(index.entries) == shard.samples:
            with suppress(OSError):  # a read-only folder: the next process makes the index again
                write_index(self.folder.root / index_name(shard.name), index)
        return index


def open_shards(data: Data, location: str) -> ShardSet:
    """Open shards of a run, in the state that its config says. Raises UserError, as `ShardSet.open` does."""
    return ShardSet.open(location, data.cache, data.cache_gib, data.generations.get(location))


def _load(data: bytes) -> dict[str, Tensor]:
    try:
        return load(data)
    except KeyError as error:  # a dtype that torch does not have
        raise ValueError(f"it contains numbers of type {error}") from error


def _read_part(file: BinaryIO, offset: int, size: int) -> bytes:
    if offset + size > os.fstat(file.fileno()).st_size:  # checked before memory for `size` bytes is allocated
        raise ValueError("the file ends before it")
    file.seek(offset)
    return file.read(size)


def _read(folder: LocalFolder | RemoteFolder, location: str, name: str) -> bytes:
    try:
        return folder.read_bytes(name)
    except OSError as error:
        reason = f"cannot read {name} ({error.strerror or error}); `anyflow prepare` writes this file when it finishes"
        raise UserError(location, reason) from None


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite. A finite sum has finite terms only; an infinite one needs the second pass."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
