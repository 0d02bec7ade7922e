"""Random numbers as a function of (seed, step, global position, purpose), and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor


def draw_key(*parts: int | str) -> int:
    """Hash numbers and names to a 63-bit generator seed. It is the same on every machine."""
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Draw:
    """The random numbers of one micro-batch.

    A position is the place of a sample in the global batch of the step. The numbers therefore do not depend on the
    number of processes, on gradient accumulation or on workers.

    Example:
        draw = Draw(seed=0, step=0, positions=(0, 1), device=torch.device("cpu"))
        noise = draw.normal("noise", (2, 4, 8, 8))  # (2, 2, 4, 8, 8)

    Attributes:
        seed: seed of the run.
        step: training step, from 0.
        positions: global position of each of the B samples.
        device: device of the numbers. CPU and GPU generators give different numbers.
        scope: prefix of every purpose, so that two parts of a step can use the same purpose.
    """

    seed: int
    step: int
    positions: tuple[int, ...]
    device: torch.device
    scope: str = ""

    def scoped(self, name: str) -> Draw:
        """Random numbers of the same samples under an additional prefix, independent of those without it."""
        return replace(self, scope=f"{self.scope}{name}: ")

    def shared(self, purpose: str, columns: int) -> list[float]:
        """Uniform numbers in [0, 1), the same for all samples of the step and on every process."""
        generator = torch.Generator().manual_seed(draw_key(self.seed, self.step, self.scope + purpose))
        return torch.rand(columns, generator=generator).tolist()

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers, (B, *shape) float32."""
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self._generators(purpose)])

    def uniform(self, purpose: str, columns: int) -> Tensor:
        """Uniform numbers in [0, 1), (B, columns) float32."""
        return torch.stack([torch.rand(columns, generator=g, device=self.device) for g in self._generators(purpose)])

    def chances(self, purpose: str) -> tuple[float, ...]:
        """One uniform number in [0, 1) per sample, as Python floats. Use it to decide which network calls are made."""
        return tuple(replace(self, device=torch.device("cpu")).uniform(purpose, 1).flatten().tolist())

    def _generators(self, purpose: str) -> list[torch.Generator]:
        keys = [draw_key(self.seed, self.step, position, self.scope + purpose) for position in self.positions]
        return [torch.Generator(self.device).manual_seed(key) for key in keys]
