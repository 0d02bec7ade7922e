"""Flow maps that compute each kind of call once. A repeated call is only counted, at the cost of the first one."""

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
        numbers: how many numbers its memory holds; more than its shape says if it is a view of a larger tensor.
    """

    shape: torch.Size
    dtype: torch.dtype
    numbers: int


class Composed(NamedTuple):
    """Dataclass or tuple of described values."""

    kind: Callable[..., Any]
    parts: tuple[Any, ...]


Repeats = Callable[[Condition], bool]
"""Tells whether calls with gradient under a condition are computed once per kind."""


def everything(condition: Condition) -> bool:
    """Compute every kind of call once, which counts operations exactly."""
    return True


def chunk_by_chunk(condition: Condition) -> bool:
    """Compute once only the calls of a causal rollout, for counting memory.

    Their gradients are complete only after the backward passes of all of them, so when each part arrives is no matter.
    """
    return isinstance(condition.past, CachedContext)


@dataclass(frozen=True)
class RememberedFlowMap:
    """Flow map on fake tensors, whose repeated calls are not computed.

    Attributes:
        parameters: what a call with gradient trains. If there are none, such calls are always computed.
        repeats: which calls with gradient are computed once.
        known: maps the description of a call to the description of its result and to its cost.
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
    """Call that is not computed. Empty tensors take the memory of what it would save for its backward pass."""

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
    """Give the recipe flow maps that compute each kind of call once.

    Args:
        repeats: which calls with gradient are computed once.
    """

    def wrap(role: str, inner: FlowMap) -> FlowMap:
        trained = recipe.trainables.get(role)
        parameters: Any = () if trained is None else tuple(trained.engine.shards().values())
        return RememberedFlowMap(inner, meter, parameters, repeats)

    return replace(recipe, roles=recipe.roles.wrapped(wrap), averaged=RememberedFlowMap(recipe.averaged, meter))


def described(value: Any) -> Any:
    """Replace the tensors of a value by descriptions. The result is hashable if the rest of the value is."""
    if isinstance(value, Tensor):
        return Described(value.shape, value.dtype, value.untyped_storage().nbytes() // value.itemsize)
    if isinstance(value, tuple | list):
        return Composed(_as_tuple, tuple(described(part) for part in value))
    if is_dataclass(value):
        return Composed(cast(Any, type(value)), tuple(described(getattr(value, each.name)) for each in fields(value)))
    return value


def made(value: Any) -> Any:
    """Make a value of this description, with new empty tensors."""
    if isinstance(value, Described):
        return torch.empty(value.numbers, dtype=value.dtype)[: value.shape.numel()].view(value.shape)
    if isinstance(value, Composed):
        return value.kind(*(made(part) for part in value.parts))
    return value


def _as_tuple(*parts: Any) -> tuple[Any, ...]:
    return parts
