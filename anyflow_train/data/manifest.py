"""What a folder of shards holds and what it was made with, so that a run refuses shards made for something else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from anyflow_train.config.base import Model
from anyflow_train.config.network import Architecture
from anyflow_train.config.run import Data
from anyflow_train.data.fingerprint import NAMED
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.files import atomic_file, write_json

MANIFEST = "manifest.json"
TEXT = "text.safetensors"
FORMAT = "anyflow_train shards 1"


class ShardInfo(Model):
    """One tar of the folder. bytes: its size, None if unknown (a remote copy is then not checked)."""

    name: str
    samples: int
    bytes: int | None = None


class CodecInfo(Model):
    """What encoded the shards.

    vae, text_encoder: fingerprints (see `data.fingerprint`); vae is None for prompts without video.
    latents_mean, latents_std: the normalisation of each latent channel.
    """

    source: str
    vae: str | None = None
    text_encoder: str
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()


class Manifest(Model):
    """`manifest.json` of a shard folder.

    kind: video (latents and text) or prompts (text alone).
    latent_shape: (F, C, H, W) of every sample; None for prompts.
    frames, height, width, fps: of the clips, in pixels and frames per second; None for prompts.
    longest_text: tokens of the longest caption; None if unknown.
    clips, skipped: how many clips there were, and how many of them are not in the shards (`skipped.jsonl` names them).
    """

    format: Literal["anyflow_train shards 1"]
    kind: Literal["video", "prompts"]
    shards: tuple[ShardInfo, ...]
    text_dim: int
    latent_shape: tuple[int, int, int, int] | None = None
    latent_dtype: Literal["fp32", "bf16"] | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    max_text_length: int | None = None
    longest_text: int | None = None
    codec: CodecInfo
    negative_prompt: str = ""
    validation_prompts: tuple[str, ...] = ()
    clips: int | None = None
    skipped: int = 0

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True)
class PromptTexts:
    """The manifest's embeddings, trimmed to their valid tokens: (L, D) each."""

    negative: Tensor
    validation: tuple[Tensor, ...]


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Decode `manifest.json`. Raises UserError naming the first thing that is wrong with it."""
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        problem = f"{key}: {first['msg']}; this folder needs shards that `anyflow prepare` wrote"
        raise UserError(where, problem) from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically."""
    write_json(folder / MANIFEST, json.loads(manifest.model_dump_json(exclude_none=True)))


def write_prompt_texts(path: Path, texts: PromptTexts) -> None:
    """Write `text.safetensors` atomically."""
    tensors = {"negative": texts.negative.contiguous()}
    tensors |= {f"validation.{number}": text.contiguous() for number, text in enumerate(texts.validation)}
    with atomic_file(path) as file:
        file.write(save(tensors))


def parse_prompt_texts(data: bytes, manifest: Manifest, where: str) -> PromptTexts:
    """Decode `text.safetensors`. Raises UserError if it does not fit the manifest."""
    try:
        tensors = load(data)
        validation = tuple(tensors[f"validation.{number}"] for number in range(len(manifest.validation_prompts)))
        texts = PromptTexts(tensors["negative"], validation)
    except (SafetensorError, KeyError) as error:
        raise UserError(where, f"does not hold the embeddings that the manifest names ({error})") from None
    for text in (texts.negative, *texts.validation):
        if text.ndim != 2 or text.shape[1] != manifest.text_dim or not torch.isfinite(text).all():
            raise UserError(where, f"holds a text of shape {tuple(text.shape)} or with non-finite numbers")
    return texts


def check_compatible(
    manifest: Manifest, data: Data, architecture: Architecture, vae_fingerprint: str | None, key: str = "data.shards"
) -> None:
    """Refuse shards that were made for something else than this run.

    Args:
        data: what the run expects; also used for held-out shards, whose own config key is `key`.
        architecture: the student's, for its channels and text width.
        vae_fingerprint: of the run's own VAE; None if it is not known.

    Raises:
        UserErrors: all the differences, each with the config key and the manifest's value.
    """
    if manifest.kind == "prompts" or manifest.latent_shape is None:
        raise UserError(key, "these shards hold prompts without video; this run trains on video")
    frames, channels, height, width = manifest.latent_shape
    pairs = [
        ("data.frames", data.frames, manifest.frames, "frames"),
        ("data.height", data.height, manifest.height, "pixels high"),
        ("data.width", data.width, manifest.width, "pixels wide"),
        ("student.architecture.in_channels", architecture.in_channels, channels, "latent channels"),
        ("student.architecture.text_dim", architecture.text_dim, manifest.text_dim, "numbers per text token"),
    ]
    errors = [
        UserError(name, f"{wanted}, but the shards of {key} were made with {found} {unit}")
        for name, wanted, found, unit in pairs
        if wanted != found
    ]
    patch = architecture.patch_size
    if frames % patch[0] or height % patch[1] or width % patch[2]:
        shape = f"{frames}x{height}x{width}"
        errors.append(UserError("student.architecture.patch_size", f"{patch} does not divide the latents, {shape}"))
    longest = manifest.longest_text
    if longest is not None and longest > max(data.text_lengths):
        problem = f"{list(data.text_lengths)} cannot hold the longest text of {key}: {longest} tokens"
        errors.append(UserError("data.text_lengths", problem))
    made_by = manifest.codec.vae
    known = made_by is not None and not made_by.startswith(NAMED)
    if vae_fingerprint is not None and known and made_by != vae_fingerprint:
        problem = f"encoded by the VAE of {manifest.codec.source} ({made_by}), not by this run's"
        errors.append(UserError(key, f"{problem} ({vae_fingerprint})"))
    if errors:
        raise UserErrors(errors)
