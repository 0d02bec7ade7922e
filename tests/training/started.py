"""Runs to start from that need no training: checkpoints with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from anyflow_train.config.run import RunConfig
from anyflow_train.models.adapters import trainable_parameters
from anyflow_train.models.build import build_network
from anyflow_train.training.checkpoints.state import TrainState
from anyflow_train.training.checkpoints.writing import save_checkpoint
from anyflow_train.training.networks import start_student
from tests.training.helpers import settings


def config(folder: Path, name: str, init: Path | str, adapter: dict[str, Any], **changes: Any) -> RunConfig:
    given = {"student__init": str(init), "student__adapter": adapter, "student__time_frequency_limit": None}
    return RunConfig.model_validate(settings(folder, name=name, **given, **changes))


def network(folder: Path, **changes: Any) -> Path:
    """Write a network in diffusers' layout."""
    if not (folder / "network").exists():
        architecture = settings(folder, **changes)["student"]["architecture"]
        build_network({**architecture, "gate_value": 0.25}, 3, 0.03).save_pretrained(folder / "network")
    return folder / "network"


def trained(folder: Path, name: str, init: Path | str, adapter: dict[str, Any], step: int = 1, **changes: Any) -> Path:
    """A run whose averages are noise around its start, and whose raw weights are zero."""
    decoded = config(folder, name, init, adapter, **changes)
    draw = torch.Generator().manual_seed(len(name) + step)
    weights = {n: p.detach() for n, p in trainable_parameters(start_student(decoded.student, 0)).items()}
    ema = {n: w + 0.1 * torch.randn(w.shape, generator=draw) for n, w in weights.items()}
    groups = {"weights": {n: torch.zeros_like(w) for n, w in weights.items()}.items(), "ema": ema.items()}
    save_checkpoint(folder / name / "checkpoints", decoded, TrainState(step=step), {"student": step}, groups)
    return folder / name
