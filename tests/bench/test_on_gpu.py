"""What only a GPU can show. `-m gpu` runs them; on the pretended GPU they show wrong devices, dtypes and memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from anyflow_train.__main__ import main as anyflow
from anyflow_train.bench import command
from anyflow_train.bench.notes import Notes
from anyflow_train.bench.steps import OURS, ours
from tests.training.helpers import final_tensors, settings, train, write_latents

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("part", ["agreement", "attention", "kernels", "eager", "compiled", "fp8", "published"])
def test_a_part_finds_nothing_wrong(part: str, tmp_path: Path) -> None:
    """Networks and steps of all stages agree with a CPU, kernels with their formulas, and steps are finite."""
    file = tmp_path / "found.json"
    command.main(part, str(file), "60", "True", *command.PARTS[part].settings)
    assert "wrong" not in json.loads(file.read_text())


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "zero3_offload"])
def test_zero_makes_the_steps_of_a_cpu_and_saves(strategy: str, tmp_path: Path) -> None:
    """In a process of its own, because DeepSpeed keeps its state."""
    assert anyflow(["bench", f"out={tmp_path}", "rehearse=true", f"only=[{strategy}]"]) == 0


def test_memory_is_what_the_plan_says(tmp_path: Path) -> None:
    """Within 5 %, for two blocks of the 1.3B model at 81 frames."""
    notes = Notes(tmp_path / "found.json", 60)
    ours(notes, False, [*OURS, "student.architecture.num_layers=2"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["gib"] == pytest.approx(found["planned_gib"], rel=0.05)


def test_a_resumed_run_is_bit_equal_and_can_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # else the sums of attention's backward vary
    try:
        write_latents(tmp_path / "shards")
        config = settings(tmp_path, engine__device="cuda", engine__precision="bf16")
        whole = train({**config, "name": "whole", "steps": 6})
        train({**config, "name": "halves", "steps": 3})
        halves = train({**config, "name": "halves", "steps": 6})
    finally:
        torch.use_deterministic_algorithms(False)
    expected, found = final_tensors(whole), final_tensors(halves)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert anyflow(["export", str(halves), f"out={tmp_path / 'exported'}", "format=transformer"]) == 0
