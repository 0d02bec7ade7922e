"""Clips from prompts by one model: their size, the noise that they start from, and their frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anyflow_train.config.chunks import Chunks
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.evaluation.load import LoadedNetwork
from anyflow_train.evaluation.sampling import padded_condition
from anyflow_train.evaluation.video import Frames, to_frames
from anyflow_train.flow.causal import Sampler
from anyflow_train.flow.types import FlowMap
from anyflow_train.models.codec import Codec


@dataclass(frozen=True)
class ClipRequest:
    """What a user says of the clips; None: as the model was trained.

    Attributes:
        frames, height, width: in pixels.
        chunk_partition: latent frames of a causal model's chunks.
    """

    frames: int | None
    height: int | None
    width: int | None
    chunk_partition: tuple[int, ...] | None


@dataclass(frozen=True)
class Size:
    """Of the videos: frames (4n + 1), height and width in pixels."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Shape:
    """What the clips of a model are like.

    Attributes:
        size: in pixels.
        latent: (F, C, H, W).
        chunks: of a causal model.
    """

    size: Size
    latent: tuple[int, int, int, int]
    chunks: Chunks | None

    def noise(self, seed: int) -> Tensor:
        """(1, F, C, H, W) float32: the same that diffusers' pipeline draws from a CPU generator of that seed."""
        frames, channels, height, width = self.latent
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(1, channels, frames, height, width, generator=generator).transpose(1, 2).contiguous()


def clip_shape(requested: ClipRequest, model: LoadedNetwork, codec: Codec) -> Shape:
    """The configured size, and what follows from it; what is not configured is that of the training data.

    Raises:
        UserErrors: the size is neither configured nor known, or does not fit the networks.
        UserError: the chunks do not make up the clip, or the model is not causal.
    """
    size = _size(requested, model)
    frames = (size.frames - 1) // codec.temporal_factor + 1
    chunks = _chunks(requested, model, size, frames)
    _check_size(size, codec, model, chunks)
    sides = (size.height // codec.spatial_factor, size.width // codec.spatial_factor)
    return Shape(size, (frames, model.network.config["in_channels"], *sides), chunks)


@dataclass(frozen=True)
class ClipMaker:
    """A model that is ready to make clips.

    Attributes:
        flow_map: on its device, guided if the user wants it.
        sampler: of the model, with its chunks.
        codec: decodes.
        text_length: tokens to which texts are padded.
        shift: of the times.
    """

    flow_map: FlowMap
    sampler: Sampler
    codec: Codec
    text_length: int
    shift: float

    @torch.inference_mode()
    def make(self, text: Tensor, noise: Tensor, steps: int) -> Frames:
        """One clip in `steps` calls, from a text (L, D) and noise (1, F, C, H, W)."""
        condition = padded_condition([text], self.text_length, self.codec.device)
        latents = self.sampler(self.flow_map, noise.to(self.codec.device), condition, steps, self.shift)
        return to_frames(self.codec.decode_video(latents)[0])


def encode_texts(
    source: str, texts: Sequence[str], length: int, device: torch.device, dtype: torch.dtype | None
) -> list[Tensor]:
    """Embeddings (L_i, D) float32 on the CPU; the text encoder, often the largest network of all, is freed after.

    One by one: beside other texts rounding would differ, and a whole benchmark's would not fit into memory.

    Args:
        source: pipeline folder or hub id.
        dtype: of the text encoder; None is float32.

    Raises:
        UserError: the source has no text encoder.
    """
    codec = Codec.load(source, device, dtype or torch.float32)
    return [codec.encode_text([text], length)[0].float().cpu() for text in texts]


def _size(requested: ClipRequest, model: LoadedNetwork) -> Size:
    given = {"frames": requested.frames, "height": requested.height, "width": requested.width}
    sides = _trained_size(model) | {name: value for name, value in given.items() if value is not None}
    missing = [name for name in given if name not in sides]
    if missing:
        raise UserErrors([UserError(name, f"is not set, and {model.name} does not say it; set it") for name in missing])
    return Size(**sides)


def _trained_size(model: LoadedNetwork) -> dict[str, int]:
    """The size of the clips that the network was trained on, as far as it is known."""
    known = {name: getattr(model.sampling, name) for name in ("frames", "height", "width")}
    return {name: value for name, value in known.items() if value is not None}


def _chunks(requested: ClipRequest, model: LoadedNetwork, size: Size, frames: int) -> Chunks | None:
    """Of a causal model, for clips of so many latent frames."""
    partition = requested.chunk_partition
    if model.chunks is None:
        if partition is not None:
            problem = f"{list(partition)}, but {model.name} generates all frames together; leave it out"
            raise UserError("chunk_partition", problem)
        return None
    chunks = replace(model.chunks, partition=partition or model.chunks.partition)
    if sum(chunks.partition) != frames:
        problem = f"{list(chunks.partition)} sums to {sum(chunks.partition)}, but frames={size.frames} gives {frames}"
        raise UserError("chunk_partition", f"{problem} latent frames; give one that sums to {frames}")
    return chunks


def _check_size(size: Size, codec: Codec, model: LoadedNetwork, chunks: Chunks | None) -> None:
    errors = []
    factor = codec.temporal_factor
    if size.frames % factor != 1:
        nearest = max(0, round((size.frames - 1) / factor)) * factor + 1
        errors.append(UserError("frames", f"{size.frames} is not {factor}n + 1; {nearest} is"))
    compressed = chunks is not None and len(chunks.partition) > chunks.full_limit
    patch = model.network.config["compressed_patch_size" if compressed else "patch_size"]
    for name, side, tokens in (("height", size.height, patch[1]), ("width", size.width, patch[2])):
        if side % (codec.spatial_factor * tokens):
            errors.append(UserError(name, f"{side} is no multiple of {codec.spatial_factor * tokens}"))
    if errors:
        raise UserErrors(errors)
