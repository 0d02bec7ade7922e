"""One tensor of a run as a checkpoint names it, wherever its parts lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """A tensor that may be spread over processes.

    Attributes:
        shape: of the whole.
        read: the whole; every process must call it, and each gets it.
        write: put the whole in its place; every process must call it, with equal tensors.
        dtype: of the whole.
    """

    shape: torch.Size
    read: Callable[[], Tensor]
    write: Callable[[Tensor], object]
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        """A tensor that this process holds whole."""
        return cls(tensor.shape, tensor.detach, tensor.detach().copy_, tensor.dtype)


@torch.no_grad()
def read_entries(entries: Mapping[str, Entry]) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors, one at a time; every process must take all of them."""
    for name, entry in entries.items():
        yield name, entry.read()
