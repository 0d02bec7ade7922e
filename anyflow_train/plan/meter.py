"""Counts what a step computes and holds, operation by operation, on fake or real tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
    """One kind of operations: in which part of a step, of which dtype, and whether checkpointing repeats them."""

    part: str
    dtype: torch.dtype
    repeated: bool


class Moment(NamedTuple):
    """Bytes that a process holds in one moment of a step, in addition to its state.

    Attributes:
        activations: of everything that is none of the other kinds.
        copies: half-precision copies of weights, which autocast makes.
        gradients: of all parameters, summed up so far.
        arrived: of the gradients that the backward pass under way has given so far.
        earlier: 1 if gradients of earlier backward passes of this update were there before, else 0.
    """

    activations: int
    copies: int
    gradients: int
    arrived: int
    earlier: int


@dataclass(frozen=True)
class Recorded:
    """A call without gradient: its operations, and the bytes that it adds at its fullest moment."""

    operations: Counter[Work]
    activations: int
    copies: int


class Meter(TorchDispatchMode):
    """Counts operations by part of a step, and remembers the fullest moments of every part.

    Memory is that of the storages that are alive: what an operation allocates for itself alone is not seen.

    Attributes:
        operations: of matrix products and attention, as torch's own counter counts them.
        samples: by part, of all calls of a flow map.
        moments: by part, the candidates for its fullest moment: see `note`.
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
        """Inside is a part of the step."""
        before, self._part = self._part, name
        self.samples[name] += samples
        if name.endswith(BACKWARD):
            self._arrived, self._earlier = 0, self._held[GRADIENTS] > 0
        try:
            yield
        finally:
            self._part = before

    def record(self, call: Callable[[], Any]) -> tuple[Any, Recorded]:
        """Make a call without gradient that returns no tensor, and see what the next one like it takes.

        What the first call keeps, such as a table of rotations, is there already for the next one.
        """
        operations, before = self.operations.copy(), self._held.copy()
        self._fullest = before
        result = call()
        kept = self._held[ACTIVATIONS] - before[ACTIVATIONS]
        activations = self._fullest[ACTIVATIONS] - before[ACTIVATIONS] - kept
        return result, Recorded(self.operations - operations, activations, self._fullest[COPIES] - before[COPIES])

    def replay(self, call: Recorded) -> None:
        """Count a recorded call once more. Its result is not made."""
        self.operations.update(call.operations)
        self._held[ACTIVATIONS] += call.activations
        self._held[COPIES] += call.copies
        self.note()
        self._held[ACTIVATIONS] -= call.activations
        self._held[COPIES] -= call.copies

    def settle(self) -> None:
        """Count all that is alive now as state, and begin to count anew: the networks are built."""
        for record in list(self._records.values()):
            self._become(record, STATE)
        self.restart()

    def restart(self) -> None:
        """Forget operations, samples and moments; what is alive stays counted."""
        self.operations, self.samples, self.moments, self._ranks = Counter(), Counter(), {}, {}

    def watch_gradient(self, parameter: Parameter) -> None:
        """Tell gradients of a parameter from activations, from the moment at which they are complete."""
        parameter.register_post_accumulate_grad_hook(self._see_gradient)

    def is_state(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory was there before the step."""
        record = self._records.get(tensor.untyped_storage())
        return record is not None and record.kind == STATE

    def note(self) -> None:
        """Remember this moment if it is the fullest of its part: with gradients, without, or once most have arrived.

        An engine that cuts gradients over the processes finds its own fullest moment among these three.
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
        count = FLASH_ON_CPU.get(packet) or flop_registry.get(packet)
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
        """Count a tensor's memory, unless it was seen before; whether it was counted."""
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
    """A storage that is alive."""

    kind: str
    size: int


# Torch's counter does not know its own kernels for a CPU.
FLASH_ON_CPU: Mapping[Any, Any] = MappingProxyType(
    {
        ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
            q.shape, k.shape, v.shape
        ),
        ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)
        ),
    }
)
