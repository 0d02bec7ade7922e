"""Where a command computes."""

import pytest
import torch

from anyflow_train.devices import autocast_dtype, pick_device
from anyflow_train.errors import UserError


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Torch as it is on a node with so many GPUs; returns the list of those that are made current."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    assert pick_device("auto", 0) == torch.device("cpu")
    with pytest.raises(UserError, match=r"engine\.device: 'cuda', but torch finds no GPU"):
        pick_device("cuda", 0, "engine.device", 0)
    gpus(monkeypatch, 1)
    assert pick_device("auto", 0) == torch.device("cuda")
    assert pick_device("cpu", 0, local_rank=5) == torch.device("cpu")


def test_every_process_of_a_node_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    current = gpus(monkeypatch, 2)
    assert pick_device("cuda", 0, local_rank=1) == torch.device("cuda", 1)
    assert current == [1]
    with pytest.raises(UserError, match="LOCAL_RANK: 2, but this node has 2 GPUs"):
        pick_device("auto", 0, local_rank=2)


def test_matrix_products_run_in_half_precision_unless_fp32_is_asked_for() -> None:
    assert [autocast_dtype(name) for name in ("fp32", "bf16", "fp16")] == [None, torch.bfloat16, torch.float16]
