"""Description of a shard folder and of the codec that made it. A run refuses shards that do not fit it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from anyflow_train.config.base import ClipSize, Model
from anyflow_train.config.network import Architecture
from anyflow_train.config.run import Data
from anyflow_train.data.fingerprint import known
from anyflow_train.errors import UserError, raise_all
from anyflow_train.files import FileName, atomic_file, write_json

if TYPE_CHECKING:  # `anyflow check` reads manifests without torch
    from torch import Tensor

MANIFEST = "manifest.json"
TEXT = "text.safetensors"
FORMAT = "anyflow_train shards 1"
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


class ShardInfo(Model):
    """One tar of the folder.

    bytes: its size; None if unknown, then the size of remote copies is not checked.
    index_sha256: checksum of its index file, which contains the checksum of every sample; None if unknown.
    buckets: number of each sample's bucket as one of `DIGITS`, in order; empty if the folder has one bucket.
    """

    name: FileName
    samples: Annotated[int, Field(ge=0, lt=1 << 40)]
    bytes: NonNegativeInt | None = None
    index_sha256: str | None = None
    buckets: str = ""


class CodecInfo(Model):
    """The codec that encoded the shards.

    vae, text_encoder: fingerprints (see `data.fingerprint`); vae is None for prompts without video.
    latents_mean, latents_std: normalisation of each latent channel.
    """

    source: str
    vae: str | None = None
    text_encoder: str
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    @property
    def known_vae(self) -> str | None:
        """Fingerprint of the VAE; None if there is none or its files could not be read."""
        return known(self.vae)


Range = tuple[NonNegativeInt, NonNegativeInt]
LatentShape = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]


class Bucket(Model):
    """Clips of one size. frames, height, width: as of `Manifest`. latent_shape: (F, C, H, W)."""

    frames: PositiveInt
    height: PositiveInt
    width: PositiveInt
    latent_shape: LatentShape

    @property
    def size(self) -> ClipSize:
        """Size of the clips."""
        return ClipSize(self.frames, self.height, self.width)


class Growing(Model):
    """Parts of the manifest that change when a folder grows, except its shards.

    dropped: places (first, last + 1) in a shard of samples that a later one replaces, because the clip has changed.
    longest_text: tokens of the longest caption; None if unknown.
    text: file of the prompts' embeddings.
    clips, skipped: number of clips in the source, and how many of them were skipped (see `skipped.jsonl`).
    """

    dropped: dict[FileName, tuple[Range, ...]] = Field(default_factory=dict)
    longest_text: NonNegativeInt | None = None
    negative_prompt: str = ""
    validation_prompts: tuple[str, ...] = ()
    text: FileName = TEXT
    clips: int | None = None
    skipped: int = 0


class State(Growing):
    """State of a folder after one call of `anyflow prepare`. shards: number of its shards, counted from the first."""

    shards: NonNegativeInt


class Manifest(Growing):
    """`manifest.json` of a shard folder.

    kind: `video` (latents and text) or `prompts` (text alone).
    latent_shape: (F, C, H, W) of every sample, or of those of the first bucket; None for prompts.
    frames, height, width, fps: size and rate of the clips, in pixels and frames per second; None for prompts.
    buckets: all buckets if there are several, the first one included.
    earlier: states of the folder before it grew, the oldest first. A run resumes on the state that it began with.
    """

    format: Literal["anyflow_train shards 1"]
    kind: Literal["video", "prompts"]
    shards: tuple[ShardInfo, ...]
    text_dim: PositiveInt
    latent_shape: LatentShape | None = None
    latent_dtype: Literal["fp32", "bf16"] | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    buckets: tuple[Bucket, ...] = ()
    max_text_length: int | None = None
    codec: CodecInfo
    earlier: tuple[State, ...] = ()

    @property
    def samples(self) -> int:
        """Number of samples in all shards, without dropped ones."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of samples in each shard, without dropped ones."""
        lost = {name: sum(end - start for start, end in ranges) for name, ranges in self.dropped.items()}
        return tuple(shard.samples - lost.get(shard.name, 0) for shard in self.shards)

    @property
    def clip_sizes(self) -> tuple[ClipSize, ...]:
        """Sizes of the buckets; nothing for prompts."""
        if self.frames is None or self.height is None or self.width is None:
            return ()
        return tuple(one.size for one in self.buckets) or (ClipSize(self.frames, self.height, self.width),)

    def places(self, shard: int, bucket: int) -> list[int]:
        """List the places in a shard of the samples of a bucket, without dropped ones."""
        info = self.shards[shard]
        lost = {place for start, end in self.dropped.get(info.name, ()) for place in range(start, end)}
        digit = DIGITS[bucket]
        return [place for place, found in enumerate(info.buckets) if found == digit and place not in lost]

    @property
    def counts(self) -> dict[ClipSize, int]:
        """Number of samples of each size; nothing for prompts."""
        if not self.buckets:
            return dict.fromkeys(self.clip_sizes, self.samples)
        shards = range(len(self.shards))
        return {one: sum(len(self.places(n, bucket)) for n in shards) for bucket, one in enumerate(self.clip_sizes)}

    def of(self, bucket: int | None) -> Manifest:
        """Return the manifest with the size of one of its buckets as its own."""
        return self if bucket is None else self.model_copy(update=dict(self.buckets[bucket]))

    @property
    def unused(self) -> dict[str, Any]:
        """Keys that older versions do not have, if their values say nothing, in the form of pydantic's `exclude`."""
        keys = {key: True for key in ("dropped", "text", "earlier", "buckets") if getattr(self, key) in ({}, TEXT, ())}
        return keys if self.buckets else {**keys, "shards": {"__all__": {"buckets"}}}

    @property
    def generations(self) -> int:
        """Number of states that the folder has had."""
        return len(self.earlier) + 1

    def at(self, generation: int | None) -> Manifest:
        """Return the manifest as it was in a generation, counted from 0; None is the newest one."""
        if generation is None or generation >= len(self.earlier):
            return self.model_copy(update={"earlier": ()})
        state = self.earlier[generation]
        return self.model_copy(update={**dict(state), "shards": self.shards[: state.shards], "earlier": ()})

    def grown(self, states: Sequence[State], shards: Sequence[ShardInfo]) -> Manifest:
        """Return the manifest with other states, the newest last, and the shards of the newest one."""
        return self.model_copy(update={**dict(states[-1]), "shards": tuple(shards), "earlier": tuple(states[:-1])})


@dataclass(frozen=True)
class PromptTexts:
    """Embeddings of the manifest's prompts, valid tokens only: (L, D) each."""

    negative: Tensor
    validation: tuple[Tensor, ...]


def unused_samples(manifests: Iterable[Manifest], sizes: Sequence[ClipSize]) -> list[str]:
    """Say how many samples have other sizes than those to train on; nothing if there are none."""
    held = Counter[ClipSize]()
    for manifest in manifests:
        held.update(manifest.counts)
    unused = {size: count for size, count in held.items() if count and size not in sizes}
    named = ", ".join(f"{count} of {size}" for size, count in unused.items())
    count = f"{sum(unused.values())} of {held.total()} samples are not used"
    return [f"{count}, as their sizes are not in data.buckets: {named}"] if unused else []


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Decode `manifest.json`. Raises UserError with the first mistake in it."""
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        problem = f"{key}: {first['msg']}; name a folder of shards that `anyflow prepare` wrote"
        raise UserError(where, problem) from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically. That of a folder that has not grown can be read by older versions."""
    write_json(folder / MANIFEST, json.loads(manifest.model_dump_json(exclude_none=True, exclude=manifest.unused)))


def write_prompt_texts(path: Path, texts: PromptTexts) -> None:
    """Write `text.safetensors` atomically."""
    from safetensors.torch import save

    tensors = {"negative": texts.negative.contiguous()}
    tensors |= {f"validation.{number}": text.contiguous() for number, text in enumerate(texts.validation)}
    with atomic_file(path) as file:
        file.write(save(tensors))


def parse_prompt_texts(data: bytes, manifest: Manifest, where: str) -> PromptTexts:
    """Decode `text.safetensors`. Raises UserError if it does not fit the manifest."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        validation = tuple(tensors[f"validation.{number}"] for number in range(len(manifest.validation_prompts)))
        texts = PromptTexts(tensors["negative"], validation)
    except (SafetensorError, KeyError) as error:
        raise UserError(where, f"lacks embeddings of the manifest's prompts ({error})") from None
    for text in (texts.negative, *texts.validation):
        if text.ndim != 2 or text.shape[1] != manifest.text_dim or not torch.isfinite(text).all():
            shape = f"finite numbers of shape (L, {manifest.text_dim})"
            raise UserError(where, f"contains a text of shape {tuple(text.shape)} that is not {shape}")
    return texts


def check_compatible(
    manifest: Manifest, data: Data, architecture: Architecture, vae_fingerprint: str | None, key: str = "data.shards"
) -> None:
    """Check that shards fit a run.

    Args:
        manifest: manifest of the shards.
        data: data config of the run; held-out shards must fit it too.
        architecture: architecture of the student; its channels and text width are compared.
        vae_fingerprint: fingerprint of the run's VAE; None if it is not known.
        key: config key that names the shards.

    Raises:
        UserErrors: all differences, each with the config key and the manifest's value.
    """
    if manifest.kind == "prompts" or manifest.latent_shape is None:
        raise UserError(key, "these shards contain prompts without video, but this run trains on video")
    frames, channels, height, width = manifest.latent_shape
    found, wanted = manifest.clip_sizes, data.sizes if key == "data.shards" else (data.size,)
    several_sizes = len(found) + len(wanted) > 2
    if several_sizes and not {*found} & {*wanted}:
        sizes, held = ("; ".join(map(str, several)) for several in (wanted, found))
        advice = "data.buckets to some of them" if key == "data.shards" else "data.frames, ... to one of them"
        raise UserError(key, f"the sizes of {key} are {held}, but this run needs {sizes}; set {advice}")
    units = {"frames": "frames", "height": "pixels high", "width": "pixels wide"} if not several_sizes else {}
    pairs = [(f"data.{name}", getattr(data, name), getattr(manifest, name), unit) for name, unit in units.items()]
    pairs.append(("student.architecture.in_channels", architecture.in_channels, channels, "latent channels"))
    errors = [*_different(pairs, key), *_text_errors(manifest, data, architecture, key)]
    patch = architecture.patch_size
    if frames % patch[0] or height % patch[1] or width % patch[2]:
        shape = f"{frames}x{height}x{width}"
        problem = f"{patch} does not divide the latents' size {shape}"
        errors.append(UserError("student.architecture.patch_size", problem))
    if vae_fingerprint not in (None, manifest.codec.known_vae or vae_fingerprint):
        problem = f"encoded by the VAE of {manifest.codec.source} ({manifest.codec.vae}), not by this run's VAE"
        errors.append(UserError(key, f"{problem} ({vae_fingerprint})"))
    raise_all(errors)


def check_texts(manifest: Manifest, data: Data, architecture: Architecture, key: str = "data.shards") -> None:
    """Check that the texts of shards fit a run that uses no clips. Raises UserErrors, like `check_compatible`."""
    raise_all(_text_errors(manifest, data, architecture, key))


def _text_errors(manifest: Manifest, data: Data, architecture: Architecture, key: str) -> list[UserError]:
    width = ("student.architecture.text_dim", architecture.text_dim, manifest.text_dim, "numbers per text token")
    errors, longest = _different([width], key), manifest.longest_text
    if longest is not None and longest > max(data.text_lengths):
        problem = f"{list(data.text_lengths)} cannot hold the longest text of {key}: {longest} tokens"
        errors.append(UserError("data.text_lengths", problem))
    return errors


def _different(pairs: Iterable[tuple[str, object, object, str]], key: str) -> list[UserError]:
    """List the settings (name, ours, that of the shards, unit) that differ."""
    return [
        UserError(name, f"{wanted}, but the shards of {key} were made with {found} {unit}")
        for name, wanted, found, unit in pairs
        if wanted != found
    ]
