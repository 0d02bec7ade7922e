"""The processes of a run: ranks, devices and agreement, before they train."""

from __future__ import annotations

import pytest
import torch

from anyflow_train.config.run import Engine as EngineConfig
from anyflow_train.errors import UserError
from anyflow_train.training.processes.world import start_world


def test_half_a_launch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE: is 2"):
        start_world(EngineConfig(device="cpu"))


def test_a_word_for_a_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="'two'"):
        start_world(EngineConfig(device="cpu"))


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"engine\.device"):
        start_world(EngineConfig(device="cuda"))
