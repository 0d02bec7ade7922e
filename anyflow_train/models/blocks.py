"""Transformer block of Wan2.1, with the parameter names of its checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anyflow_train.flow.path import at_least_float32
from anyflow_train.models.attend import AttentionPattern, attend
from anyflow_train.models.fused import (
    add_gated,
    gelu_tanh,
    modulated_layer_norm,
    rotated_rms_norm,
    wide_layer_norm,
)
from anyflow_train.models.kv_cache import StopAfterKV


class AnyFlowTransformerBlock(nn.Module):
    """A block of self-attention, attention to the text, and feed-forward.

    The modulation has one row per frame or per sample. It is broadcast over the tokens, not expanded.
    """

    def __init__(self, dim: int, ffn_dim: int, heads: int, cross_attn_norm: bool, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.attn1 = Attention(dim, heads, eps)
        self.norm2 = WideLayerNorm(dim, eps) if cross_attn_norm else None
        self.attn2 = Attention(dim, heads, eps)
        self.ffn = FeedForward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        modulation: Tensor,
        rotation: Tensor,
        pattern: AttentionPattern | StopAfterKV | None = None,
    ) -> Tensor:
        """Apply the block.

        Args:
            x: (B, S, D) tokens, frame by frame.
            text: (B, L, D) text tokens.
            modulation: (B or 1, F or 1, 6, D) float32.
            rotation: (S, head_dim / 2, 2) float32 table of `rotary`.
            pattern: attention pattern of self-attention; None means all-to-all. `StopAfterKV` records keys and values
                and skips the rest of the block.

        Returns:
            (B, S, D) in the dtype of x; x itself for `StopAfterKV`.
        """
        modulation = modulation + at_least_float32(self.scale_shift_table)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = modulation.chunk(6, dim=2)

        normed, x = modulated_layer_norm(x, shift_attn, scale_attn, self.eps)
        if isinstance(pattern, StopAfterKV):
            pattern.keep(*self.attn1.keys_and_values(normed, rotation))
            return x
        x = add_gated(x, self.attn1(normed, normed, rotation, pattern), gate_attn)
        normed, x = (x, x) if self.norm2 is None else self.norm2(x)
        x = x + self.attn2(normed, text)
        normed, x = modulated_layer_norm(x, shift_ffn, scale_ffn, self.eps)
        return add_gated(x, self.ffn(normed), gate_ffn)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys. The norm spans all heads, as in Wan2.1."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])  # a list, because checkpoints name it `to_out.0`
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def forward(
        self, x: Tensor, context: Tensor, rotation: Tensor | None = None, pattern: AttentionPattern | None = None
    ) -> Tensor:
        """Compute self-attention or cross-attention.

        Args:
            x: (B, S, D) tokens of the queries.
            context: (B, L, D) tokens of the keys and values; x itself for self-attention.
            rotation: (S, head_dim / 2, 2) float32, for self-attention.
            pattern: attention pattern of self-attention; None means all-to-all.

        Returns:
            (B, S, D).
        """
        query = self.norm_q(self.to_q(x), self.heads, rotation)
        key, value = self.keys_and_values(context, rotation)
        attended = attend(query, key, value) if pattern is None else pattern.attend(query, key, value)
        return self.to_out[0](attended)

    def keys_and_values(self, context: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute rotated keys and values: (B, L, D) -> twice (B, L, H, head_dim). Arguments as in `forward`."""
        key = self.norm_k(self.to_k(context), self.heads, rotation)
        return key, self.to_v(context).unflatten(2, (self.heads, -1))


class RMSNorm(nn.Module):
    """RMS norm of queries or keys over all heads with a learned weight, and their rotation."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, heads: int, rotation: Tensor | None) -> Tensor:
        """Compute (B, S, D) -> (B, S, heads, head_dim); see `fused.rotated_rms_norm`."""
        return rotated_rms_norm(x, self.weight, self.eps, heads, rotation)


class WideLayerNorm(nn.LayerNorm):
    """Layer norm that computes in float32 or wider; see `fused.wide_layer_norm`."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return wide_layer_norm(input, self.weight, self.bias, self.eps)


class FeedForward(nn.Module):
    """Two linear layers with a tanh-approximated GELU between. Checkpoints number them `net.0` and `net.2`."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GeluLinear(dim, inner_dim), nn.Identity(), nn.Linear(inner_dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class GeluLinear(nn.Module):
    """A linear layer followed by a tanh-approximated GELU."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_tanh(self.proj(x))
