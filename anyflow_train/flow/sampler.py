"""Samplers: from noise to data in any number of network calls."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from anyflow_train.flow.times import sampling_grid
from anyflow_train.flow.types import CachedContext, CausalFlowMap, Condition, FlowMap


def jump(flow_map: FlowMap, x: Tensor, t: float, r: float, condition: Condition) -> Tensor:
    """Apply the flow map once, `X(x, t, r) = x - (t - r) u(x, t, r)`. One network call; x is (B, F, C, H, W)."""
    batch = x.shape[:1]
    source = torch.full(batch, t, dtype=x.dtype, device=x.device)
    target = torch.full(batch, r, dtype=x.dtype, device=x.device)
    return x - (t - r) * flow_map(x, source, target, condition)


@torch.no_grad()
def sample(flow_map: FlowMap, z: Tensor, condition: Condition, calls: int, shift: float) -> Tensor:
    """Sample with a student in any number of network calls (AnyFlow, arXiv 2605.13724).

    Example:
        latents = sample(student.flow_map, torch.randn(1, 5, 16, 60, 104), condition, calls=4, shift=5.0)

    Args:
        flow_map: average velocity `(x, t, r, condition) -> u`.
        z: (B, F, C, H, W) standard normal noise, float32.
        condition: of the B samples.
        calls: number of jumps, each one network call.
        shift: time shift of the grid; larger values take more of the calls near noise.

    Returns:
        (B, F, C, H, W) normalised latents in the dtype of z. `Codec.decode_video` decodes them.

    Raises:
        ValueError: fewer than 1 call.
    """
    times = sampling_grid(calls, shift)
    x = z
    for t, r in pairwise(times):
        x = jump(flow_map, x, t, r, condition)
    return x


def sample_euler(flow_map: FlowMap, z: Tensor, condition: Condition, calls: int, shift: float) -> Tensor:
    """Sample a teacher with Euler steps along the velocity at r = t. Arguments and result are those of `sample`."""

    def velocity(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        return flow_map(x, t, t, condition)

    return sample(velocity, z, condition, calls, shift)


def guided(flow_map: FlowMap, negative: Condition, scale: float) -> FlowMap:
    """Apply classifier-free guidance, `u_neg + w (u - u_neg)`. Each call takes two network calls.

    Args:
        flow_map: the flow map to guide.
        negative: the negative prompt, text (1, L, D).
        scale: the CFG scale w; 1 means no guidance and returns `flow_map` itself. In code that computes
            `cond + k (cond - uncond)`, w is `1 + k`.
    """
    return flow_map if scale == 1 else _Guided(flow_map, negative, scale)


@dataclass(frozen=True)
class _Guided:
    """A guided flow map. The cached context of a causal network depends on the text, so it holds one for each text."""

    flow_map: FlowMap
    negative: Condition
    scale: float

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        with_text, without = condition, condition.with_text(self.negative.text)
        if isinstance(condition.past, CachedContext) and isinstance(condition.past.kv_cache, _TwoCaches):
            caches, chunks = condition.past.kv_cache, condition.past.chunks
            with_text = with_text.after(CachedContext(chunks, caches.with_text))
            without = without.after(CachedContext(chunks, caches.without))
        return torch.lerp(self.flow_map(x, t, r, without), self.flow_map(x, t, r, with_text), self.scale)

    def encode_context(self, x: Tensor, chunks: tuple[int, ...], condition: Condition) -> object:
        flow_map = cast(CausalFlowMap, self.flow_map)
        without = condition.with_text(self.negative.text)
        return _TwoCaches(flow_map.encode_context(x, chunks, condition), flow_map.encode_context(x, chunks, without))


@dataclass(frozen=True)
class _TwoCaches:
    with_text: object
    without: object
