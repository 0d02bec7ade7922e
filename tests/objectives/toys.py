"""Small batches, a small network as a flow map, and random numbers in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.types import Condition, FlowMap
from anyflow_train.objectives.types import Roles

SHAPE = (2, 2, 2, 2)
TEXT = (3, 4)


class DoubleDraw(Draw):
    """Random numbers of the library, converted to float64 before any arithmetic."""

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return super().normal(purpose, shape).double()

    def uniform(self, purpose: str, columns: int) -> Tensor:
        return super().uniform(purpose, columns).double()


class SmallNetwork(nn.Module):
    """A network u(x, t, r, text) of two layers with a sine of time, in float64."""

    def __init__(self, seed: int = 0, width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(seed)
        elements = torch.Size(SHAPE).numel()
        self.enter = nn.Linear(elements + 4 + TEXT[1], width)
        self.leave = nn.Linear(width, elements)
        self.double()

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        times = torch.stack([t, r, (9 * t).sin(), (7 * r).cos()], dim=1)
        features = torch.cat([x.flatten(1), times, condition.text.mean(dim=1)], dim=1)
        return self.leave(self.enter(features).tanh()).reshape(x.shape)


@dataclass
class Recorded:
    """A flow map that records the x, t, r and text of its calls."""

    flow_map: FlowMap
    calls: list[tuple[Tensor, Tensor, Tensor, Condition]] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        self.calls.append((x, t, r, condition))
        return self.flow_map(x, t, r, condition)


def batch_of(positions: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Batch:
    """Samples that only depend on their position."""
    draw = Draw(11, 0, positions, torch.device("cpu"))
    latents, text = draw.normal("latents", SHAPE).to(dtype), draw.normal("text", TEXT).to(dtype)
    negative = Draw(12, 0, (0,), torch.device("cpu")).normal("text", TEXT).to(dtype)
    keys = tuple(f"sample-{position}" for position in positions)
    return Batch(latents, Condition(text), Condition(negative), keys, positions)


def draw_of(positions: tuple[int, ...], step: int = 3) -> DoubleDraw:
    """Random numbers of some positions of one step."""
    return DoubleDraw(5, step, positions, torch.device("cpu"))


def one_network(network: FlowMap, teacher: FlowMap | None = None) -> Roles:
    """Roles in which the student is also used for the derivative."""
    return Roles(student=network, derivative=network, teacher=teacher)
