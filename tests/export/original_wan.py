"""Wan2.1's network as in its own repository, from the names of its weights alone, and ComfyUI's part around it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_DIM = 128


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x: Tensor, context: Tensor, rotate: Callable[[Tensor], Tensor]) -> Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        q, k, v = (part.unflatten(2, (-1, HEAD_DIM)) for part in (q, k, v))
        q, k = rotate(q), rotate(k)
        return self.o(
            F.scaled_dot_product_attention(*(p.transpose(1, 2) for p in (q, k, v))).transpose(1, 2).flatten(2)
        )


class Block(nn.Module):
    def __init__(self, dim: int, ffn: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.norm3 = nn.LayerNorm(dim, 1e-6)
        self.self_attn, self.cross_attn = Attention(dim), Attention(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU("tanh"), nn.Linear(ffn, dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(self, x: Tensor, e0: Tensor, context: Tensor, rotate: Callable[[Tensor], Tensor]) -> Tensor:
        e = (self.modulation + e0).chunk(6, dim=1)
        y = self.norm1(x) * (1 + e[1]) + e[0]
        x = x + self.self_attn(y, y, rotate) * e[2]
        x = x + self.cross_attn(self.norm3(x), context, lambda part: part)
        return x + self.ffn(self.norm2(x) * (1 + e[4]) + e[3]) * e[5]


class Head(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.head = nn.Linear(dim, out)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation + e[:, None]).chunk(2, dim=1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class WanModel(nn.Module):
    """The text-to-video network. All sizes are read from the shapes of the weights, as ComfyUI does."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        shape = {name: weight.shape for name, weight in weights.items()}
        dim, channels, *self.patch = shape["patch_embedding.weight"]
        self.freq_dim = shape["time_embedding.0.weight"][1]
        ffn, text = shape["blocks.0.ffn.0.weight"][0], shape["text_embedding.0.weight"][1]
        count = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        self.patch_embedding = nn.Conv3d(channels, dim, tuple(self.patch), tuple(self.patch))
        self.text_embedding = nn.Sequential(nn.Linear(text, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(self.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, ffn) for _ in range(count))
        self.head = Head(dim, shape["head.head.weight"][0])
        self.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=True)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Predict the velocity: (B, C, F, H, W), t in 0..1000 (B,), (B, L, D) -> (B, C, F, H, W)."""
        x = self.patch_embedding(x)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        angles = t.double()[:, None] * 10000 ** (
            -torch.arange(self.freq_dim // 2, dtype=torch.float64) * 2 / self.freq_dim
        )
        e = self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=1).float())
        e0 = self.time_projection(e).unflatten(1, (6, -1))
        context, turn = self.text_embedding(text), rotation(grid)
        for block in self.blocks:
            x = block(x, e0, context, lambda part: rotated(part, turn))
        x = self.head(x, e).unflatten(2, (*self.patch, -1)).unflatten(1, grid)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def rotation(grid: Sequence[int]) -> Tensor:
    """Rotary factors of all tokens, complex (F * H * W, 1, HEAD_DIM / 2)."""
    widths = (HEAD_DIM - 4 * (HEAD_DIM // 6), 2 * (HEAD_DIM // 6), 2 * (HEAD_DIM // 6))
    parts = []
    for axis, (length, width) in enumerate(zip(grid, widths, strict=True)):
        angle = torch.outer(torch.arange(length), 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width))
        shape = [1, 1, 1, -1]
        shape[axis] = length
        parts.append(torch.polar(torch.ones_like(angle), angle).view(shape).expand(*grid, -1))
    return torch.cat(parts, dim=-1).flatten(0, 2)[:, None]


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).float()


class ComfyModel:
    """What a node sees of a loaded model: `clone`, `model.diffusion_model`, and the wrapper of the network's calls."""

    def __init__(self, network: WanModel) -> None:
        self.diffusion_model, self.model, self.wrapper = network, self, None

    def clone(self) -> ComfyModel:
        return ComfyModel(self.diffusion_model)

    def set_model_unet_function_wrapper(self, wrapper: Any) -> None:
        self.wrapper = wrapper

    def apply_model(self, x: Tensor, sigma: Tensor, c_crossattn: Tensor, transformer_options: Any) -> Tensor:
        return self.diffusion_model(x, 1000 * sigma, c_crossattn)

    def velocity(self, x: Tensor, sigma: Tensor, text: Tensor, sigmas: Tensor) -> Tensor:
        c = {"c_crossattn": text, "transformer_options": {"sample_sigmas": sigmas}}
        if self.wrapper is None:
            return self.apply_model(x, sigma, **c)
        return self.wrapper(self.apply_model, {"input": x, "timestep": sigma, "c": c, "cond_or_uncond": [0]})

    def euler(self, noise: Tensor, text: Tensor, sigmas: Tensor) -> Tensor:
        """Sample as ComfyUI's `euler`: x + (sigma_next - sigma) * (x - denoised) / sigma."""
        x = noise
        for sigma, following in itertools.pairwise(sigmas):
            denoised = x - sigma * self.velocity(x, sigma.expand(len(x)), text, sigmas)
            x = x + (following - sigma) * (x - denoised) / sigma
        return x


def simple_schedule(steps: int, shift: float) -> Tensor:
    """The scheduler "simple" after the node ModelSamplingSD3."""
    times = torch.arange(1, 1001) / 1000
    sigmas = shift * times / (1 + (shift - 1) * times)
    return torch.tensor([float(sigmas[-(1 + int(x * len(sigmas) / steps))]) for x in range(steps)] + [0.0])


def with_lora(base: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Patch weights as ComfyUI does at strength 1. Every entry of the file must be used."""
    weights, left = {name: weight.float() for name, weight in base.items()}, dict(lora)
    for name in weights:
        path = f"diffusion_model.{name.removesuffix('.weight').removesuffix('.bias')}"
        if name.endswith(".weight") and f"{path}.lora_A.weight" in left:
            second, first = left.pop(f"{path}.lora_B.weight"), left.pop(f"{path}.lora_A.weight")
            weights[name] = weights[name] + second.float() @ first.float()
        ending = "diff" if name.endswith(".weight") else "diff_b"
        if f"{path}.{ending}" in left:
            weights[name] = weights[name] + left.pop(f"{path}.{ending}").float()
    assert not left, f"ComfyUI would not load {sorted(left)}"
    return weights
