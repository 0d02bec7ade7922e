"""Copy tensors from a GPU to the host through two pinned buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

BUFFER_BYTES = 1 << 26
Named = tuple[str, Tensor]


@dataclass
class _Buffer:
    """A buffer of bytes, and what is on its way through it.

    Attributes:
        memory: (N,) uint8, pinned for a GPU.
        event: marks the end of the copies into the buffer; None on a CPU.
        used: bytes that are filled.
        parts: pairs of a part of the buffer and its place in a tensor on the host.
        complete: tensors whose last part is in this buffer.
    """

    memory: Tensor
    event: torch.cuda.Event | None
    used: int = 0
    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    complete: list[Named] = field(default_factory=list)

    def sent(self) -> None:
        """Mark the end of the copies into the buffer."""
        if self.event is not None:
            self.event.record()

    def empty(self) -> list[Named]:
        """Wait for the copies into the buffer, and copy its content to the host's tensors. Returns complete tensors."""
        if self.event is not None:
            self.event.synchronize()
        for part, place in self.parts:
            place.copy_(part)
        complete, self.used, self.parts, self.complete = self.complete, 0, [], []
        return complete


def staged(tensors: Iterable[Named], device: torch.device, size: int = BUFFER_BYTES) -> Iterator[Named]:
    """Yield copies of tensors on the host, in order.

    Copies from pageable memory would synchronise once per tensor. Here one buffer is filled by the GPU while the other
    one is emptied: one synchronisation per buffer, and the pinned memory does not grow with what is saved.

    Args:
        device: device of the tensors.
        size: bytes of each of the two buffers.
    """
    gpu = device.type == "cuda"
    filling, other = (
        _Buffer(torch.empty(size, dtype=torch.uint8, pin_memory=gpu), torch.cuda.Event() if gpu else None)
        for _ in range(2)
    )
    for name, tensor in tensors:
        source = tensor.detach().contiguous().flatten().view(torch.uint8)
        copy = torch.empty_like(source, device="cpu")
        start = 0
        while start < source.numel():
            if filling.used == size:
                filling.sent()
                yield from other.empty()
                filling, other = other, filling
            count = min(size - filling.used, source.numel() - start)
            part = filling.memory[filling.used : filling.used + count]
            part.copy_(source[start : start + count], non_blocking=True)
            filling.parts.append((part, copy[start : start + count]))
            filling.used, start = filling.used + count, start + count
        filling.complete.append((name, copy.view(tensor.dtype).view(tensor.shape)))
    filling.sent()
    yield from other.empty()
    yield from filling.empty()
