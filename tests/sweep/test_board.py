"""The comparison of a sweep's variants: means and intervals over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anyflow_train.sweep.board import write_board
from tests.sweep.test_sweep import TINY, plan


def cell(model: str, calls: int, value: float) -> dict[str, Any]:
    estimate = {"value": value, "low": value - 0.1, "high": value + 0.1}
    seen = {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}
    return {
        "model": model,
        "steps": calls,
        "energy_distance": estimate,
        "trajectory_error": estimate,
        "recognition": seen,
    }


def test_seeds_of_a_variant_are_averaged(tmp_path: Path) -> None:
    runs = plan([TINY, f"out={tmp_path}", "arms.a=[]", "arms.b=['objective=semigroup']", "seed=1,2"], None)
    values = {"teacher": 4.0, "a_seed-1": 1.0, "a_seed-2": 2.0, "b_seed-1": 0.5, "b_seed-2": 0.7}
    report = {
        "cells": [cell(name, calls, value / calls) for name, value in values.items() for calls in (1, 2)],
        "config": {"calls": [2, 1], "reference": "data"},
        "real": {"energy_floor": 0.3},
    }
    text = write_board(tmp_path, runs, report)
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == ["variant", "steps", "CPU time", "calls", "energy distance", "error to fine ODE", "accuracy"]
    assert [row[0] for row in rows[1:]] == ["teacher", "teacher", "a", "a", "b", "b"]
    assert rows[3][1:] == ["400", "0 s", "1", "1.500 [0.900, 2.100]", "1.500 [0.900, 2.100]", "0.500 [0.400, 0.600]"]
    assert "Mean over 2 seeds" in text
    assert (tmp_path / "board.md").read_text() in text
    assert (tmp_path / "board.png").stat().st_size > 10_000
