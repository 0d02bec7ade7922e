"""Flow maps that compute each kind of call once: a repeated one costs what the first one did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

from anyflow_train.flow.types import CachedContext, CausalFlowMap, Condition, FlowMap
from anyflow_train.models.kernels import transformed
from anyflow_train.plan.meter import Meter, RecordedGradient
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


Repeats = Callable[[Condition], bool]
"""Whether calls with gradient under this condition are computed once per kind."""


def everything(condition: Condition) -> bool:
    """All calls: exact for operations."""
    return True


def chunk_by_chunk(condition: Condition) -> bool:
    """The calls of a causal rollout: their gradients are complete only when all of them went back."""
    return isinstance(condition.past, CachedContext)


@dataclass(frozen=True)
class RememberedFlowMap:
    """A flow map on fake tensors, whose repeated calls are not computed.

    Attributes:
        parameters: those that a call with gradient trains; without any, such calls are always computed.
        repeats: which calls with gradient are computed once.
        known: description of a call -> its result described, and what it took.
    """

    flow_map: FlowMap
    meter: Meter
    parameters: tuple[Parameter, ...] = ()
    repeats: Repeats = everything
    known: dict[Any, tuple[Any, Any]] = field(default_factory=dict)

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        call = partial(self.flow_map, t=t, r=r, condition=condition)
        if transformed():
            return call(x)
        if not torch.is_grad_enabled():
            return self._once((x, t, r, condition), lambda: call(x))
        if not self.parameters or not self.repeats(condition):
            return call(x)
        key = described((x, t, r, condition, x.requires_grad))
        if key not in self.known:
            past = described(condition.past)
            result, recorded = self.meter.record_with_gradient(
                lambda x, past: self.flow_map(x, t, r, condition.after(past)), x, lambda: made(past), self.parameters
            )
            self.known[key] = described(result), recorded
        result, recorded = self.known[key]
        past = condition.past if recorded.keeps_past else None
        return _Repeated.apply(self.meter, result, recorded, past, x, *recorded.trained)

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


class _Repeated(Function):
    """A call that is not computed. Tensors without content take the memory of what it saves for its backward."""

    @staticmethod
    def forward(
        ctx: Any, meter: Meter, result: Any, recorded: RecordedGradient, past: Any, x: Tensor, *trained: Parameter
    ) -> Tensor:
        ctx.meter, ctx.recorded = meter, recorded
        ctx.held = x, past, meter.hold(*recorded.saved)  # patches are a view of x
        found = made(result)
        meter.replay(recorded.forward)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.meter.replay(ctx.recorded.backward)
        back = torch.empty_like(ctx.held[0]) if ctx.needs_input_grad[4] else None
        ctx.held = None
        return None, None, None, None, back, *map(torch.empty_like, ctx.recorded.trained)


def remembered(recipe: Recipe, meter: Meter, repeats: Repeats) -> Recipe:
    """The same recipe with flow maps that compute each kind of call once.

    Args:
        repeats: which of the calls with gradient.
    """

    def wrap(role: str, inner: FlowMap) -> FlowMap:
        trained = recipe.trainables.get(role)
        parameters: Any = () if trained is None else tuple(trained.engine.shards().values())
        return RememberedFlowMap(inner, meter, parameters, repeats)

    return replace(recipe, roles=recipe.roles.wrapped(wrap), averaged=RememberedFlowMap(recipe.averaged, meter))


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
