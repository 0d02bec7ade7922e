"""Randomness as a function: every draw depends on (seed, step, global position, purpose) and on nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor


def draw_key(*parts: int | str) -> int:
    """A 63-bit generator seed from any tuple of numbers and names; the same on every machine."""
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Draw:
    """The random numbers of one micro-batch.

    A position is a sample's place in the step's global batch, so the numbers do not depend on ranks, accumulation or
    workers.

    Attributes:
        seed, step: of the run.
        positions: global position of each of the B samples.
        device: where the numbers are made; CPU and GPU generators differ.
        scope: put before every purpose, so that two users of a step may name theirs alike.
    """

    seed: int
    step: int
    positions: tuple[int, ...]
    device: torch.device
    scope: str = ""

    def scoped(self, name: str) -> Draw:
        """The random numbers of the same samples for another user."""
        return replace(self, scope=f"{self.scope}{name}: ")

    def shared(self, purpose: str, columns: int) -> list[float]:
        """Uniform numbers in [0, 1) that all samples of the step have in common, on every process."""
        generator = torch.Generator().manual_seed(draw_key(self.seed, self.step, self.scope + purpose))
        return torch.rand(columns, generator=generator).tolist()

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers, (B, *shape) float32."""
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self._generators(purpose)])

    def uniform(self, purpose: str, columns: int) -> Tensor:
        """Uniform numbers in [0, 1), (B, columns) float32."""
        return torch.stack([torch.rand(columns, generator=g, device=self.device) for g in self._generators(purpose)])

    def chances(self, purpose: str) -> tuple[float, ...]:
        """A uniform number in [0, 1) for each sample, on the host: for what decides which forwards are made."""
        return tuple(replace(self, device=torch.device("cpu")).uniform(purpose, 1).flatten().tolist())

    def _generators(self, purpose: str) -> list[torch.Generator]:
        keys = [draw_key(self.seed, self.step, position, self.scope + purpose) for position in self.positions]
        return [torch.Generator(self.device).manual_seed(key) for key in keys]
