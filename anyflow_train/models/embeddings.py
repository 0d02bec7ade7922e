"""Embeddings of latents, times and text, with the parameter names of Wan2.1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

from anyflow_train.flow.path import at_least_float32
from anyflow_train.models.fused import gelu_tanh


class PatchEmbedding(nn.Conv3d):
    """Embeds the patches of each frame as tokens.

    It has the parameters of a convolution. Because kernel and stride are equal, it is computed as a matrix product,
    which is several times faster on a CPU.
    """

    def __init__(self, in_channels: int, dim: int, patch: int) -> None:
        super().__init__(in_channels, dim, kernel_size=(1, patch, patch), stride=(1, patch, patch))

    def forward(self, input: Tensor) -> Tensor:
        """Embed latents: (B, C, F, H, W) -> (B, D, F, H / patch, W / patch), stored with D as the last axis."""
        patch = self.kernel_size[1]
        # First move channels last: two copies of long runs take a sixth of the time of one copy of single numbers.
        pixels = input.permute(0, 2, 3, 4, 1).contiguous()
        patches = pixels.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).transpose(3, 4).flatten(4)
        weight = self.weight.permute(0, 2, 3, 4, 1).flatten(1)
        return F.linear(patches, weight, self.bias).permute(0, 4, 1, 2, 3)


def resized_patch(weight: Tensor, size: Sequence[int]) -> Tensor:
    """Resize the weight of a `PatchEmbedding` by trilinear interpolation: (D, C, 1, p, p) -> (D, C, *size).

    It is computed in float32 or wider (FAR, arXiv 2503.19325).
    """
    resized = F.interpolate(at_least_float32(weight), size=tuple(size), mode="trilinear", align_corners=False)
    return resized.to(weight.dtype)


def patch_tokens(embedding: nn.Module, latents: Tensor) -> Tensor:
    """Embed latents as tokens, frame by frame and row by row: (B, F, C, H, W) -> (B, F * H / patch * W / patch, D)."""
    return embedding(latents.transpose(1, 2)).flatten(2).transpose(1, 2)


class ConditionEmbedder(nn.Module):
    """Embeds the source time, the target time and the text.

    The time embedding is `(1 - gate) E_time(t) + gate E_delta(r or t - r)` (AnyFlow, arXiv 2605.13724).
    """

    delta_emb_gate: Tensor

    def __init__(self, dim: int, freq_dim: int, text_dim: int, gate_value: float, deltatime_type: str) -> None:
        super().__init__()
        self.deltatime_type = deltatime_type
        self.timesteps_proj = Timesteps(freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(freq_dim, dim)
        self.delta_embedder = TimestepEmbedding(freq_dim, dim)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TextProjection(text_dim, dim)
        # The explicit device keeps the value of the gate if the network is built on the meta device.
        gate = torch.tensor([gate_value], dtype=torch.float32, device="cpu")
        self.register_buffer("delta_emb_gate", gate, persistent=False)

    def forward(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Embed times.

        Args:
            t, r: (b, f) source and target time in 0..1000.

        Returns:
            (b, f, D) time embedding and (b, f, 6, D) modulation of the blocks, both float32.
        """
        delta = r if self.deltatime_type == "r" else t - r
        # Never in half precision: the time derivative depends on small differences of these few rows.
        with torch.autocast(t.device.type, enabled=False):
            embedding = torch.lerp(
                self._embed(self.time_embedder, t),
                self._embed(self.delta_embedder, delta),
                at_least_float32(self.delta_emb_gate),
            )
            modulation = self.time_proj(F.silu(embedding).to(self.time_proj.weight.dtype))
        return embedding, at_least_float32(modulation).unflatten(-1, (6, -1))

    def _embed(self, embedder: TimestepEmbedding, times: Tensor) -> Tensor:
        features = self.timesteps_proj(times.flatten()).to(embedder.linear_1.weight.dtype)
        return at_least_float32(embedder(features)).unflatten(0, times.shape)


class TextProjection(nn.Module):
    """Projects text embeddings to the width of the network: (B, L, text_dim) -> (B, L, D)."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear_2(gelu_tanh(self.linear_1(text)))
