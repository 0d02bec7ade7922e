"""From noise to data in any number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from anyflow_train.flow.times import sampling_grid
from anyflow_train.flow.types import CachedContext, CausalFlowMap, Condition, FlowMap


def jump(flow_map: FlowMap, x: Tensor, t: float, r: float, condition: Condition) -> Tensor:
    """One application of the flow map, `X(x, t, r) = x - (t - r) u(x, t, r)`: one network call. x: (B, F, C, H, W)."""
    batch = x.shape[:1]
    source = torch.full(batch, t, dtype=x.dtype, device=x.device)
    target = torch.full(batch, r, dtype=x.dtype, device=x.device)
    return x - (t - r) * flow_map(x, source, target, condition)


@torch.no_grad()
def sample(flow_map: FlowMap, z: Tensor, condition: Condition, steps: int, shift: float) -> Tensor:
    """Any-step sampling with a student: `steps` jumps from noise z (B, F, C, H, W) to latents of the same shape."""
    times = sampling_grid(steps, shift)
    x = z
    for t, r in pairwise(times):
        x = jump(flow_map, x, t, r, condition)
    return x


def sample_euler(flow_map: FlowMap, z: Tensor, condition: Condition, steps: int, shift: float) -> Tensor:
    """Euler steps along the instantaneous velocity: how a teacher, which knows only r = t, is sampled."""

    def velocity(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        return flow_map(x, t, t, condition)

    return sample(velocity, z, condition, steps, shift)


def guided(flow_map: FlowMap, negative: Condition, scale: float) -> FlowMap:
    """Classifier-free guidance, `u_neg + w (u - u_neg)`, at two network calls.

    Args:
        flow_map: what is guided.
        negative: the negative prompt, text (1, L, D); a sample's image condition stays.
        scale: the CFG scale w; 1 is no guidance and returns `flow_map` itself. Codes that write
            `cond + k (cond - uncond)` mean `w = 1 + k`.
    """
    return flow_map if scale == 1 else _Guided(flow_map, negative, scale)


@dataclass(frozen=True)
class _Guided:
    """A guided flow map. A causal network remembers another past under another text, so it remembers both."""

    flow_map: FlowMap
    negative: Condition
    scale: float

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        with_text, without = condition, condition.with_text(self.negative.text)
        if isinstance(condition.past, CachedContext) and isinstance(condition.past.kv_cache, _BothPasts):
            memory, chunks = condition.past.kv_cache, condition.past.chunks
            with_text = with_text.after(CachedContext(chunks, memory.with_text))
            without = without.after(CachedContext(chunks, memory.without))
        return torch.lerp(self.flow_map(x, t, r, without), self.flow_map(x, t, r, with_text), self.scale)

    def encode_context(self, x: Tensor, chunks: tuple[int, ...], condition: Condition) -> object:
        flow_map = cast(CausalFlowMap, self.flow_map)
        without = condition.with_text(self.negative.text)
        return _BothPasts(flow_map.encode_context(x, chunks, condition), flow_map.encode_context(x, chunks, without))


@dataclass(frozen=True)
class _BothPasts:
    with_text: object
    without: object
