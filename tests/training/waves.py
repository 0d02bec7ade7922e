"""A world for whole distillations in a test: travelling waves, whose clips lie on a known ring in a known plane.

Four classes (two directions, two wavelengths) of 3 frames of 8x8 pixels, brought to 4 channels of 4x4 by moving 2x2
pixels into channels, which is orthonormal: distances of latents are those of pixels. All else about a clip is one phase
and one amplitude.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from anyflow_train.data.manifest import PromptTexts
from anyflow_train.data.shards import Sample
from tests.shards import describe, write_shards

FRAMES, SIZE, CELL = 3, 8, 2
CLASSES, TEXT_DIM = 4, 16
SHAPE = (FRAMES, CELL * CELL, SIZE // CELL, SIZE // CELL)
LEAST, MOST = 0.7, 1.3


@cache
def planes() -> Tensor:
    """(4, 2, D) float32: orthonormal cosine and sine of every class."""
    rows = torch.arange(SIZE, dtype=torch.float64)
    time = torch.arange(FRAMES, dtype=torch.float64)[:, None, None] / FRAMES
    waves = []
    for label in range(CLASSES):
        along, cycles = label % 2, label // 2 + 1
        place = cycles * (rows[:, None] if along else rows[None, :]).expand(SIZE, SIZE) / SIZE
        angle = 2 * math.pi * (place - time)
        waves.append(torch.stack([to_latents(part).flatten() for part in (angle.cos(), angle.sin())]))
    found = torch.stack(waves)
    return (found / found.norm(dim=2, keepdim=True)).float()


def to_latents(video: Tensor) -> Tensor:
    """(F, 8, 8) -> (F, 4, 4, 4)."""
    cells = video.unflatten(1, (-1, CELL)).unflatten(3, (-1, CELL))
    return cells.permute(0, 2, 4, 1, 3).flatten(1, 2)


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips (count, F, C, H, W) of variance one, and their classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    phase, size = 2 * math.pi * torch.rand(count, generator=generator), torch.rand(count, generator=generator)
    radius = (LEAST + (MOST - LEAST) * size) * unit()
    ring = radius[:, None] * torch.stack([phase.cos(), phase.sin()], dim=1)
    return (ring[:, None] @ planes()[labels]).reshape(count, *SHAPE), labels


def unit() -> float:
    """The radius that gives variance one: the mean square of an amplitude U[.7, 1.3] is 1.03."""
    return math.sqrt(math.prod(SHAPE) / 1.03)


def texts() -> tuple[Tensor, Tensor]:
    """Texts of the classes, (4, 2, 16), and the negative text, (2, 16)."""
    generator = torch.Generator().manual_seed(9)
    return torch.randn(CLASSES, 2, TEXT_DIM, generator=generator), torch.randn(2, TEXT_DIM, generator=generator)


def write(folder: Path, count: int, seed: int) -> Path:
    """Shards of `count` clips."""
    (latents, labels), (of_class, negative) = draw(count, seed), texts()

    def produce() -> Iterator[Sample]:
        for number, label in enumerate(labels.tolist()):
            yield Sample(f"wave-{number:05d}", latents[number].clone(), of_class[label].clone(), f"class {label}")

    manifest = describe(SHAPE, TEXT_DIM, longest_text=2).model_copy(update={"frames": 9})
    return write_shards(folder, [produce()], manifest, PromptTexts(negative, ()))


def off_ring(latents: Tensor, labels: Tensor) -> float:
    """Mean square distance per element from the ring of the wanted class; 0 for every clip of `draw`."""
    flat = latents.flatten(1)
    inside = (planes()[labels] @ flat[:, :, None]).squeeze(2).norm(dim=1)
    outside = (flat.square().sum(1) - inside.square()).clamp_min(0)
    from_ring = inside - inside.clamp(LEAST * unit(), MOST * unit())
    return ((outside + from_ring.square()) / flat.shape[1]).mean().item()


def accuracy(latents: Tensor, labels: Tensor) -> float:
    """Share of clips with most of their energy in the plane of their class."""
    energy = (latents.flatten(1) @ planes().flatten(0, 1).T).unflatten(1, (CLASSES, 2)).square().sum(2)
    return (energy.argmax(1) == labels).float().mean().item()
