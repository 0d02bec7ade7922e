"""Making clips from prompts with one model: their size, noise and frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anyflow_train.config.base import ClipSize
from anyflow_train.config.chunks import Chunks
from anyflow_train.config.derived import latent_shape
from anyflow_train.config.rules.geometry import video_size
from anyflow_train.errors import UserError, raise_all
from anyflow_train.evaluation.load import LoadedNetwork
from anyflow_train.evaluation.sampling import padded_condition
from anyflow_train.evaluation.video import Frames, to_frames
from anyflow_train.flow.causal import Sampler
from anyflow_train.flow.types import FlowMap
from anyflow_train.models.codec import Codec


@dataclass(frozen=True)
class ClipRequest:
    """Settings of the user for the clips. None uses the value of the training data.

    Attributes:
        frames: number of frames.
        height, width: size in pixels.
        chunk_partition: latent frames of a causal model's chunks.
    """

    frames: int | None
    height: int | None
    width: int | None
    chunk_partition: tuple[int, ...] | None


@dataclass(frozen=True)
class Shape:
    """Shape of a model's clips.

    Attributes:
        size: size in pixels.
        latent: shape (F, C, H, W) of the latents.
        chunks: chunks of a causal model, otherwise None.
    """

    size: ClipSize
    latent: tuple[int, int, int, int]
    chunks: Chunks | None

    def noise(self, seed: int) -> Tensor:
        """Draw noise (1, F, C, H, W) float32, equal to the noise of diffusers' pipeline with a CPU generator."""
        frames, channels, height, width = self.latent
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(1, channels, frames, height, width, generator=generator).transpose(1, 2).contiguous()


def clip_shape(requested: ClipRequest, model: LoadedNetwork, codec: Codec) -> Shape:
    """Derive the shape of the clips from the user's settings and the size of the training data.

    Raises:
        UserErrors: the size is neither set nor known, or does not fit the networks.
        UserError: the chunks do not add up to the clip, or chunks are set for a model that is not causal.
    """
    size = _size(requested, model)
    latent = latent_shape(size, model.network.config["in_channels"], codec.temporal_factor, codec.spatial_factor)
    chunks = _chunks(requested, model, size, latent[0])
    _check_size(size, model, chunks)
    return Shape(size, latent, chunks)


@dataclass(frozen=True)
class ClipMaker:
    """A model that is ready to make clips.

    Attributes:
        flow_map: the model on its device, with guidance if it is configured.
        sampler: sampler of the model, with its chunks.
        codec: decodes the latents.
        text_length: tokens to which texts are padded.
        shift: shift of the times.
    """

    flow_map: FlowMap
    sampler: Sampler
    codec: Codec
    text_length: int
    shift: float

    @torch.inference_mode()
    def make(self, text: Tensor, noise: Tensor, steps: int) -> Frames:
        """Make one clip in `steps` calls from a text (L, D) and noise (1, F, C, H, W)."""
        condition = padded_condition([text], self.text_length, self.codec.device)
        latents = self.sampler(self.flow_map, noise.to(self.codec.device), condition, steps, self.shift)
        return to_frames(self.codec.decode_video(latents)[0])


def encode_texts(
    source: str, texts: Sequence[str], length: int, device: torch.device, dtype: torch.dtype | None
) -> list[Tensor]:
    """Encode texts to embeddings (L_i, D) float32 on the CPU, and free the text encoder, often the largest network.

    Texts are encoded one by one. In a batch, rounding would depend on the other texts, and all texts of a benchmark
    would not fit into memory.

    Args:
        source: pipeline folder or hub id.
        texts: the texts.
        length: largest number of tokens.
        device: device of the text encoder.
        dtype: dtype of the text encoder; None is float32.

    Raises:
        UserError: the source has no text encoder.
    """
    codec = Codec.load(source, device, dtype or torch.float32)
    return [codec.encode_text([text], length)[0].float().cpu() for text in texts]


def _size(requested: ClipRequest, model: LoadedNetwork) -> ClipSize:
    sides, missing = {}, []
    for name in ("frames", "height", "width"):
        values = (getattr(source, name) for source in (requested, model.sampling))
        sides[name] = next((value for value in values if value is not None), None)
        if sides[name] is None:
            problem = f"is not set, and the size that {model.name} was trained on is not known; set it"
            missing.append(UserError(name, problem))
    raise_all(missing)
    return ClipSize(**sides)


def _chunks(requested: ClipRequest, model: LoadedNetwork, size: ClipSize, frames: int) -> Chunks | None:
    """Return the chunks of a causal model for clips of `frames` latent frames; None for other models."""
    partition = requested.chunk_partition
    if model.chunks is None:
        if partition is not None:
            problem = f"{list(partition)}, but {model.name} generates all frames together; leave it out"
            raise UserError("chunk_partition", problem)
        return None
    chunks = replace(model.chunks, partition=partition or model.chunks.partition)
    if sum(chunks.partition) != frames:
        problem = f"{list(chunks.partition)} sums to {sum(chunks.partition)}, but frames={size.frames} gives {frames}"
        raise UserError("chunk_partition", f"{problem} latent frames; set chunks that sum to {frames}")
    return chunks


def _check_size(size: ClipSize, model: LoadedNetwork, chunks: Chunks | None) -> None:
    compressed = chunks is not None and len(chunks.partition) > chunks.full_limit
    patch = model.network.config["compressed_patch_size" if compressed else "patch_size"][1]
    raise_all([finding.error() for finding in video_size(*size, patch)])
