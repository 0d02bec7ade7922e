"""Sampling of many latents in batches. The noise of a sample does not depend on its batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from anyflow_train.config.chunks import Chunks
from anyflow_train.data.loader import pad_text
from anyflow_train.flow.causal import ClipSampler
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.sampler import sample, sample_euler
from anyflow_train.flow.types import CausalFlowMap, Condition, FlowMap

EULER = ClipSampler(sample_euler)


def clip_sampler(chunks: Chunks | None, any_step: bool) -> ClipSampler:
    """Choose the sampler of a network.

    Args:
        chunks: chunks of a causal network, otherwise None.
        any_step: whether the network can jump between any two times; otherwise it takes Euler steps.
    """
    return ClipSampler(sample if any_step else sample_euler, chunks)


@dataclass(frozen=True)
class Watched:
    """A flow map that reports the number of its samples before each call."""

    flow_map: FlowMap
    before_call: Callable[[int], None]

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        self.before_call(len(x))
        return self.flow_map(x, t, r, condition)

    def encode_context(self, x: Tensor, chunks: tuple[int, ...], condition: Condition) -> object:
        return cast(CausalFlowMap, self.flow_map).encode_context(x, chunks, condition)


@dataclass(frozen=True)
class Inputs:
    """Inputs of a set of samples, the same for all models that are compared.

    Attributes:
        noise: (n, F, C, H, W) float32.
        texts: n embeddings (L_i, D), valid tokens only.
        text_length: tokens to which the texts are padded with zeros, as for Wan2.1.
        batch: samples per network call.
        device: device of the networks.
        conditioning: (n, P, C, H, W) float32, clean first frames; None if all frames are generated.
    """

    noise: Tensor
    texts: list[Tensor]
    text_length: int
    batch: int
    device: torch.device
    conditioning: Tensor | None = None


def padded_condition(texts: list[Tensor], length: int, device: torch.device) -> Condition:
    """Combine embeddings (L_i, D) into one condition, text (B, length, D) float32, padded with zeros or cut."""
    return Condition(torch.stack([pad_text(text, length) for text in texts]).to(device))


def draw_noise(count: int, shape: tuple[int, ...], seed: int, purpose: str) -> Tensor:
    """Draw standard normal noise, (count, *shape) float32. The noise of sample k depends on (seed, k, purpose) alone.

    The noise is made on the CPU, so that a GPU and a CPU start from equal numbers.
    """
    return Draw(seed, 0, tuple(range(count)), torch.device("cpu")).normal(purpose, shape)


@torch.inference_mode()
def sample_all(sampler: ClipSampler, flow_map: FlowMap, inputs: Inputs, steps: int, shift: float) -> Tensor:
    """Sample latents for all inputs, (n, F, C, H, W) float32 on the CPU."""
    parts = []
    for start in range(0, len(inputs.noise), inputs.batch):
        rows = slice(start, start + inputs.batch)
        noise = inputs.noise[rows].to(inputs.device)
        condition = padded_condition(inputs.texts[rows], inputs.text_length, inputs.device)
        conditioning = None if inputs.conditioning is None else inputs.conditioning[rows].to(inputs.device)
        parts.append(sampler(flow_map, noise, condition, steps, shift, conditioning).float().cpu())
    return torch.cat(parts)
