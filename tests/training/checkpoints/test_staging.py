"""Tensors that pass through two buffers of a fixed size arrive unchanged and in order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from anyflow_train.training.checkpoints.staging import staged

CPU = torch.device("cpu")


def tensors() -> dict[str, Tensor]:
    """Several in a buffer, one in several buffers, one that ends with a buffer, not contiguous, empty, of all kinds."""
    torch.manual_seed(0)
    return {
        "small": torch.randn(3),
        "bytes": torch.arange(20, dtype=torch.uint8),
        "large": torch.randn(9, 11),
        "half": torch.randn(2, 2).bfloat16(),
        "turned": torch.randn(4, 5).t(),
        "empty": torch.empty(0, 3),
        "number": torch.tensor(2.0),
    }


@pytest.mark.parametrize("size", [8, 32, 1 << 20])
def test_copies_are_equal_and_in_order(size: int) -> None:
    given = tensors()
    found = dict(staged(given.items(), CPU, size))
    assert list(found) == list(given)
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_copy_does_not_change_with_its_source() -> None:
    given = tensors()
    found = dict(staged(given.items(), CPU, 32))
    given["large"].zero_()
    assert found["large"].norm() > 0


def test_sources_are_read_one_at_a_time() -> None:
    """A sharded tensor is gathered when it is read, so it must be free again before the next one is."""
    read: list[str] = []

    def produce() -> Iterator[tuple[str, Tensor]]:
        for name in "abcd":
            read.append(name)
            yield name, torch.ones(16)  # 64 bytes: a buffer

    copies = staged(produce(), CPU, 64)
    next(copies)
    assert len(read) <= 3
