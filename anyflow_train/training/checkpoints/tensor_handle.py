"""A handle to one saved tensor, which may be sharded over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """A handle to a tensor that may be sharded over processes.

    Attributes:
        shape: shape of the whole tensor.
        read: returns the whole tensor; every process must call it, and each gets the tensor.
        write: stores the whole tensor; every process must call it, with equal tensors.
        dtype: dtype of the whole tensor.
    """

    shape: torch.Size
    read: Callable[[], Tensor]
    write: Callable[[Tensor], object]
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        """Wrap a tensor that this process holds whole."""
        return cls(tensor.shape, tensor.detach, tensor.detach().copy_, tensor.dtype)


@torch.no_grad()
def read_entries(entries: Mapping[str, Entry]) -> Iterator[tuple[str, Tensor]]:
    """Yield names and whole tensors, one at a time. Every process must consume all of them."""
    for name, entry in entries.items():
        yield name, entry.read()
