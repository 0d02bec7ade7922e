"""The transformer block of Wan2.1, with its parameter names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyflow_train.flow.path import at_least_float32
from anyflow_train.models.attend import AttentionPattern, attend
from anyflow_train.models.fused import gelu_tanh, modulated_layer_norm, rms_norm
from anyflow_train.models.kv_cache import StopAfterKV
from anyflow_train.models.rotary import rotate


class AnyFlowTransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward.

    The modulation is kept per frame (or per sample) and broadcast over the tokens, never expanded to them.
    """

    def __init__(self, dim: int, ffn_dim: int, heads: int, cross_attn_norm: bool, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.attn1 = Attention(dim, heads, eps)
        self.norm2 = WideLayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.attn2 = Attention(dim, heads, eps)
        self.ffn = FeedForward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        modulation: Tensor,
        rotation: Tensor,
        view: AttentionPattern | StopAfterKV | None = None,
    ) -> Tensor:
        """
        Args:
            x: (B, S, D) tokens, frame by frame.
            text: (B, L, D) tokens to attend to.
            modulation: (B or 1, F or 1, 6, D) float32.
            rotation: (S, head_dim / 2, 2) float32, of `rotary`.
            view: what the tokens attend to in self-attention; None: all to all. `StopAfterKV`: stop after the keys and
                values are recorded.

        Returns:
            (B, S, D) in the dtype of x; with `StopAfterKV` x itself.
        """
        modulation = modulation + at_least_float32(self.scale_shift_table)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = modulation.chunk(6, dim=2)

        normed = modulated_layer_norm(x, shift_attn, scale_attn, self.eps)
        if isinstance(view, StopAfterKV):
            view.keep(*self.attn1.keys_and_values(normed, rotation))
            return x
        x = add_gated(x, self.attn1(normed, normed, rotation, view), gate_attn)
        x = x + self.attn2(self.norm2(x), text)
        normed = modulated_layer_norm(x, shift_ffn, scale_ffn, self.eps)
        return add_gated(x, self.ffn(normed), gate_ffn)


def add_gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """`x + update * gate` in float32 at least, returned in the dtype of x.

    x, update: (B, S, D); gate: (B or 1, F or 1, 1, D).
    """
    frames = (gate.shape[1], -1)
    # `update` is widened as CUDA's autocast would, so that a CPU keeps the same for the gate's gradient.
    x_wide, update = at_least_float32(x).unflatten(1, frames), at_least_float32(update).unflatten(1, frames)
    return torch.addcmul(x_wide, update, gate).view(x.shape).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys (the norm spans all heads, as in Wan2.1)."""

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
        self, x: Tensor, context: Tensor, rotation: Tensor | None = None, view: AttentionPattern | None = None
    ) -> Tensor:
        """
        Args:
            x: (B, S, D).
            context: (B, L, D), what is attended to: x itself in self-attention.
            rotation: (S, head_dim / 2, 2) float32, for self-attention.
            view: what the tokens attend to, for self-attention; None: all to all.

        Returns:
            (B, S, D).
        """
        query = self.norm_q(self.to_q(x)).unflatten(2, (self.heads, -1))
        key, value = self.keys_and_values(context, rotation)
        if rotation is not None:
            query = rotate(query, rotation)
        attended = attend(query, key, value) if view is None else view.attend(query, key, value)
        return self.to_out[0](attended)

    def keys_and_values(self, context: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> twice (B, L, H, head_dim), the keys rotated. Arguments as in `forward`."""
        key = self.norm_k(self.to_k(context)).unflatten(2, (self.heads, -1))
        value = self.to_v(context).unflatten(2, (self.heads, -1))
        return key if rotation is None else rotate(key, rotation), value


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class WideLayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 at least, in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        return F.layer_norm(at_least_float32(input), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class FeedForward(nn.Module):
    """Two linear layers with a tanh-approximated GELU between; `net.1` is a place without parameters in checkpoints."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GeluLinear(dim, inner_dim), nn.Identity(), nn.Linear(inner_dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class GeluLinear(nn.Module):
    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_tanh(self.proj(x))
