"""Flow maps that compute each kind of call without gradient once: a repeated one costs what the first one did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from anyflow_train.flow.types import CausalFlowMap, Condition, FlowMap
from anyflow_train.models.fused import transformed
from anyflow_train.plan.meter import Meter, Recorded
from anyflow_train.training.recipe import Recipe


class Described(NamedTuple):
    """A tensor without numbers.

    Attributes:
        numbers: in its memory, which may be a part of a larger tensor's.
    """

    shape: torch.Size
    dtype: torch.dtype
    numbers: int


class Composed(NamedTuple):
    """A dataclass or tuple of described values."""

    kind: Callable[..., Any]
    parts: tuple[Any, ...]


@dataclass(frozen=True)
class RememberedFlowMap:
    """A flow map on fake tensors, whose repeated calls are not computed.

    Attributes:
        known: description of a call -> its result described, and what it took.
    """

    flow_map: FlowMap
    meter: Meter
    known: dict[Any, tuple[Any, Recorded]] = field(default_factory=dict)

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        if torch.is_grad_enabled() or transformed():
            return self.flow_map(x, t, r, condition)
        return self._once((x, t, r, condition), lambda: self.flow_map(x, t, r, condition))

    def encode_context(self, x: Tensor, chunks: tuple[int, ...], condition: Condition) -> object:
        causal = cast(CausalFlowMap, self.flow_map)
        return self._once((x, chunks, condition), lambda: causal.encode_context(x, chunks, condition))

    def _once(self, arguments: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        key = described(arguments)
        if key in self.known:
            result, recorded = self.known[key]
            self.meter.replay(recorded)
        else:
            self.known[key] = result, _ = self.meter.record(lambda: described(call()))
        return made(result)


def remembered(recipe: Recipe, meter: Meter) -> Recipe:
    """The same recipe with flow maps that compute each kind of call without gradient once."""
    roles = recipe.roles.wrapped(lambda _, inner: RememberedFlowMap(inner, meter))
    return replace(recipe, roles=roles, averaged=RememberedFlowMap(recipe.averaged, meter))


def described(value: Any) -> Any:
    """A value whose tensors are replaced by their descriptions: hashable if all else is."""
    if isinstance(value, Tensor):
        return Described(value.shape, value.dtype, value.untyped_storage().nbytes() // value.itemsize)
    if isinstance(value, tuple | list):
        return Composed(_as_tuple, tuple(described(part) for part in value))
    if is_dataclass(value):
        return Composed(cast(Any, type(value)), tuple(described(getattr(value, each.name)) for each in fields(value)))
    return value


def made(value: Any) -> Any:
    """A value of this description, with new empty tensors."""
    if isinstance(value, Described):
        return torch.empty(value.numbers, dtype=value.dtype)[: value.shape.numel()].view(value.shape)
    if isinstance(value, Composed):
        return value.kind(*(made(part) for part in value.parts))
    return value


def _as_tuple(*parts: Any) -> tuple[Any, ...]:
    return parts
