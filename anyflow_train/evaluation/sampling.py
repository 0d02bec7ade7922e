"""Sampling many latents in batches, from noise that belongs to the sample and not to the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_train.config.chunks import Chunks
from anyflow_train.data.loader import pad_text
from anyflow_train.flow.causal import ClipSampler
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.sampler import sample, sample_euler
from anyflow_train.flow.types import Condition, FlowMap


def clip_sampler(chunks: Chunks | None, any_step: bool) -> ClipSampler:
    """How a network is sampled.

    Args:
        chunks: of a causal one.
        any_step: whether it jumps between any two times; one that knows only r = t takes Euler steps.
    """
    return ClipSampler(sample if any_step else sample_euler, chunks)


@dataclass(frozen=True)
class Inputs:
    """What a set of samples is made from; the same for all models that are compared.

    Attributes:
        noise: (n, F, C, H, W) float32.
        texts: n embeddings (L_i, D), valid tokens only.
        text_length: tokens to which the texts are padded with zeros, as Wan2.1 does.
        batch: samples per network call.
        device: where the networks are.
        conditioning: (n, P, C, H, W) float32, clean first frames; None: all are generated.
    """

    noise: Tensor
    texts: list[Tensor]
    text_length: int
    batch: int
    device: torch.device
    conditioning: Tensor | None = None

    def condition(self, rows: slice) -> Condition:
        """Padded texts of some of the samples, on the device."""
        return padded_condition(self.texts[rows], self.text_length, self.device)


def padded_condition(texts: list[Tensor], length: int, device: torch.device) -> Condition:
    """Embeddings (L_i, D) as one condition, text (B, length, D) float32: zeros after a text's end, or cut."""
    return Condition(torch.stack([pad_text(text, length) for text in texts]).to(device))


def draw_noise(count: int, shape: tuple[int, ...], seed: int, purpose: str) -> Tensor:
    """Standard normal noise, (count, *shape) float32; a sample's own depends on (seed, its number, purpose) alone.

    Made on the CPU for every device, so that a GPU and a CPU start from the same.
    """
    return Draw(seed, 0, tuple(range(count)), torch.device("cpu")).normal(purpose, shape)


@torch.inference_mode()
def sample_all(sampler: ClipSampler, flow_map: FlowMap, inputs: Inputs, steps: int, shift: float) -> Tensor:
    """Latents of all inputs, (n, F, C, H, W) float32 on the CPU."""
    parts = []
    for start in range(0, len(inputs.noise), inputs.batch):
        rows = slice(start, start + inputs.batch)
        noise = inputs.noise[rows].to(inputs.device)
        conditioning = None if inputs.conditioning is None else inputs.conditioning[rows].to(inputs.device)
        parts.append(sampler(flow_map, noise, inputs.condition(rows), steps, shift, conditioning).float().cpu())
    return torch.cat(parts)
