"""Counts what a step computes and holds, operation by operation, on fake or real tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from anyflow_train.plan import fake

ATEN = torch.ops.aten
BACKWARD = ", backward"
REST = "draws, losses and all else"
STATE, GRADIENTS, COPIES, ACTIVATIONS = "state", "gradients", "copies", "activations"


class Work(NamedTuple):
    """Kind of operations: the part of a step, the dtype, and whether checkpointing repeats them."""

    part: str
    dtype: torch.dtype
    repeated: bool


class Moment(NamedTuple):
    """Bytes that a process holds in one moment of a step, in addition to its state.

    Attributes:
        activations: bytes of everything that is none of the other kinds.
        copies: bytes of half-precision copies of weights, which autocast makes.
        gradients: bytes of the gradients of all parameters, summed up so far.
        arrived: bytes of the gradients that the present backward pass has given so far.
        earlier: 1 if gradients of earlier backward passes of this update were there before, else 0.
    """

    activations: int
    copies: int
    gradients: int
    arrived: int
    earlier: int


@dataclass(frozen=True)
class Recorded:
    """Cost of a call: its operations, and the bytes that it needs at its fullest moment and frees until its end."""

    operations: Counter[Work]
    activations: int
    copies: int


@dataclass(frozen=True)
class RecordedGradient:
    """Cost of a call with gradient.

    Attributes:
        forward: cost of the forward pass.
        saved: bytes of activations and of copies that the forward leaves for the backward, without the call's past.
        keeps_past: whether the backward needs the call's past, such as cached context that a checkpointed block reads.
        backward: cost of the backward pass, in addition to what is saved.
        trained: parameters that the backward pass gives a gradient.
    """

    forward: Recorded
    saved: tuple[int, int]
    keeps_past: bool
    backward: Recorded
    trained: tuple[Parameter, ...]


class Meter(TorchDispatchMode):
    """Counts operations by part of a step, and remembers the fullest moments of every part.

    Memory is the sum of all storages that are alive. Memory that an operation uses only inside itself is not seen.

    Attributes:
        operations: number of operations of matrix products and attention, as torch's own counter counts them.
        samples: number of samples in all calls of a flow map, by part.
        moments: candidates for the fullest moment, by part and by the rank that they lead; see `note`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[Work] = Counter()
        self.samples: Counter[str] = Counter()
        self.moments: dict[tuple[str, str], Moment] = {}
        self._part = REST
        self._ranks: dict[tuple[str, str], tuple[int, int]] = {}
        self._records: weakref.WeakKeyDictionary[Any, _Record] = weakref.WeakKeyDictionary()
        self._held: Counter[str] = Counter()
        self._arrived, self._earlier = 0, False
        self._fullest: Counter[str] = Counter()

    @contextmanager
    def part(self, name: str, samples: int = 0) -> Iterator[None]:
        """Count everything inside of the block as a part of the step.

        Args:
            name: the part.
            samples: added to the number of samples of the part.
        """
        before, self._part = self._part, name
        self.samples[name] += samples
        if name.endswith(BACKWARD):
            self._arrived, self._earlier = 0, self._held[GRADIENTS] > 0
        try:
            yield
        finally:
            self._part = before

    def record(self, call: Callable[[], Any]) -> tuple[Any, Recorded]:
        """Make a call, and measure what the next call of its kind will need.

        Memory that stays alive after the call is left out: what it keeps, such as a table of rotations, is there
        already when the next one begins.
        """
        operations = self.operations.copy()
        self._fullest = self._held.copy()
        result = call()
        added = (max(self._fullest[kind] - self._held[kind], 0) for kind in (ACTIVATIONS, COPIES))
        return result, Recorded(self.operations - operations, *added)

    def record_with_gradient(
        self,
        call: Callable[[Tensor, Any], Tensor],
        x: Tensor,
        make_past: Callable[[], Any],
        parameters: Sequence[Parameter],
    ) -> tuple[Tensor, RecordedGradient]:
        """Make a call with x and a past, then its backward pass, and measure what the next call of its kind will need.

        The two passes are not counted as a part of the step. Several calls share one past, so its memory is not a part
        of what each of them saves.
        """
        counted = self.operations, self.samples, self.moments, self._ranks
        gradients, before = [parameter.grad for parameter in parameters], self._held.copy()
        self.restart()
        for parameter in parameters:
            parameter.grad = None
        start = x.detach().requires_grad_(x.requires_grad)
        alone, past = self._held[ACTIVATIONS], [make_past()]
        past_size = self._held[ACTIVATIONS] - alone
        result, forward = self.record(lambda: call(start, past[0]))
        size, used = result.untyped_storage().nbytes(), self._held[ACTIVATIONS]
        past.clear()
        left = self._held.copy()
        kept = past_size - (used - left[ACTIVATIONS])
        _, back = self.record(lambda: result.backward(torch.empty_like(result)))
        freed, copies = (left[kind] - self._held[kind] for kind in (ACTIVATIONS, COPIES))
        # The gradient of the result is there before the backward.
        back = Recorded(back.operations, max(back.activations - freed - size, 0), max(back.copies - copies, 0))
        trained = tuple(parameter for parameter in parameters if parameter.grad is not None)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        start.grad = None
        self.operations, self.samples, self.moments, self._ranks = counted
        saved = left[ACTIVATIONS] - self._held[ACTIVATIONS] - kept, left[COPIES] - before[COPIES]
        return result.detach(), RecordedGradient(forward, saved, kept > 0, back, trained)

    def replay(self, call: Recorded) -> None:
        """Count a recorded call once more, in the present part of the step, without computing it."""
        for work, count in call.operations.items():
            self.operations[work._replace(part=self._part)] += count
        self.hold(call.activations, call.copies)

    def hold(self, activations: int, copies: int) -> tuple[Tensor, Tensor]:
        """Allocate two tensors of so many bytes, which count as activations and as copies while they are alive."""
        held = torch.empty(copies, dtype=torch.uint8)
        self._become(self._records[held.untyped_storage()], COPIES)
        return held, torch.empty(activations, dtype=torch.uint8)

    def settle(self) -> None:
        """Count all that is alive now as state, and begin to count anew. Called once the networks are built."""
        for record in list(self._records.values()):
            self._become(record, STATE)
        self.restart()

    def restart(self) -> None:
        """Forget operations, samples and moments; what is alive stays counted."""
        self.operations, self.samples, self.moments, self._ranks = Counter(), Counter(), {}, {}

    def watch_gradient(self, parameter: Parameter) -> None:
        """Count gradients of a parameter as gradients, no longer as activations, as soon as they are complete."""
        parameter.register_post_accumulate_grad_hook(self._see_gradient)

    def is_state(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory was there before the step."""
        record = self._records.get(tensor.untyped_storage())
        return record is not None and record.kind == STATE

    def note(self) -> None:
        """Remember this moment if it is the fullest of its part in one of three ways of counting.

        The three count gradients, leave them out, or look only at moments when most gradients have arrived. An engine
        that cuts gradients over the processes has its fullest moment among these three.
        """
        held, inside = self._held, self._part.endswith(BACKWARD)
        if held[ACTIVATIONS] + held[COPIES] > self._fullest[ACTIVATIONS] + self._fullest[COPIES]:
            self._fullest = held.copy()
        arrived, earlier = (self._arrived, self._earlier) if inside else (0, held[GRADIENTS] > 0)
        used = held[ACTIVATIONS] + held[COPIES]
        ranks = {"without": (used, 0), "with": (used + held[GRADIENTS], 0), "late": (arrived, used)}
        for name, rank in ranks.items():
            if rank > self._ranks.get((self._part, name), (-1, 0)):
                self._ranks[self._part, name] = rank
                self.moments[self._part, name] = Moment(
                    held[ACTIVATIONS], held[COPIES], held[GRADIENTS], arrived, earlier
                )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = fake.call(func, args, kwargs)
        if not isinstance(out, Tensor | list | tuple):
            return out
        packet = func._overloadpacket
        count = UNCOUNTED.get(packet) or flop_registry.get(packet)
        if count is not None:
            # Checkpointing repeats a forward inside of a backward, with gradients switched on.
            repeated = torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()
            work = Work(self._part, args[0].dtype, repeated)
            self.operations[work] += count(*args, **kwargs, out_val=out)
        kind = COPIES if packet is ATEN._to_copy and self.is_state(args[0]) else ACTIVATIONS
        results = (out,) if isinstance(out, Tensor) else out
        grown = [self._see(tensor, kind) for tensor in results if isinstance(tensor, Tensor)]
        # Autograd adds up the gradients of one tensor in place where it can, which it cannot with fake ones. What it
        # adds is freed at once, so this sum is never beside it.
        summed = packet is ATEN.add and torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        if any(grown) and not summed:
            self.note()
        return out

    def _see(self, tensor: Tensor, kind: str) -> bool:
        """Count a tensor's memory, unless it was seen before, and tell whether it was counted."""
        storage = tensor.untyped_storage()
        if storage in self._records:
            return False
        self._records[storage] = record = _Record(kind, storage.nbytes())
        self._held[kind] += record.size
        weakref.finalize(storage, self._free, record).atexit = False
        return True

    def _see_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._see(parameter.grad, GRADIENTS)
        self._become(self._records[parameter.grad.untyped_storage()], GRADIENTS)
        self._arrived += parameter.grad.nbytes
        self.note()

    def _become(self, record: _Record, kind: str) -> None:
        self._held[record.kind] -= record.size
        record.kind = kind
        self._held[kind] += record.size

    def _free(self, record: _Record) -> None:
        self._held[record.kind] -= record.size


@dataclass
class _Record:
    """Kind and bytes of a storage that is alive."""

    kind: str
    size: int


# Torch's counter does not know its own kernels of attention for a CPU, nor products that are added in place.
UNCOUNTED: Mapping[Any, Any] = MappingProxyType(
    {
        ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
            q.shape, k.shape, v.shape
        ),
        ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)
        ),
        ATEN.addmm_: flop_registry[ATEN.addmm],
        ATEN._scaled_mm_v2: lambda x, weight, *_, **__: 2 * x.shape[0] * x.shape[1] * weight.shape[1],
    }
)
