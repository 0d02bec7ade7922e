"""`profile=true`: a table of a step's parts and a trace, of the same training."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from anyflow_train.config.run import RunConfig
from anyflow_train.plan.dry_run import dry_run
from anyflow_train.plan.meter import REST
from anyflow_train.training.gpus import GPUS, known_gpu, utilisation
from anyflow_train.training.reporting import profile
from tests.training.helpers import assert_equal_runs, on_policy, settings, train, write_latents


def rows(printed: str) -> dict[str, list[str]]:
    """Lines of the table by part: calls, seconds, share."""
    lines = [line for line in printed.splitlines() if line.startswith("  ")]
    return {line[2:34].strip(): line[34:].split() for line in lines}


def test_parts_and_trace_of_the_same_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_latents(tmp_path / "shards")
    plain = train(settings(tmp_path, name="plain", steps=11))
    capsys.readouterr()
    run = train(settings(tmp_path, steps=11, profile=True))
    assert_equal_runs(plain, run)
    printed = capsys.readouterr().out
    found = rows(printed)
    # two micro-batches, and two difference forwards for the one of them that has samples with r < t
    calls = {name: float(cells[0]) for name, cells in found.items() if len(cells) == 3}
    assert calls == {
        "loading data": 1,
        "student, forward": 2,
        "derivative, without gradient": 2,
        "student, backward": 2,
        "student, optimizer": 1,
        "student, averages": 1,
    }
    # `anyflow plan` has the same names, so that both tables can be read side by side.
    planned = dry_run(RunConfig.model_validate(settings(tmp_path)), 1)
    names = {work.part for work in planned.operations} | {part for part, _ in planned.moments}
    assert names - {REST} == calls.keys() - {"loading data", "student, averages"}
    *parts, whole = (float(cells[-2]) for cells in found.values())
    assert sum(parts) == pytest.approx(whole, abs=1e-3)  # each is rounded to .0001
    trace = json.loads(gzip.decompress((run / "profile" / "process_0.json.gz").read_bytes()))
    assert any(event.get("name") == "aten::addmm" for event in trace["traceEvents"])


def test_both_updates_of_stage_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_latents(tmp_path / "shards")
    train(on_policy(tmp_path, steps=11, profile=True))
    found = rows(capsys.readouterr().out)
    assert {"teacher, without gradient", "fake_score, without gradient", "fake_score, backward"} <= found.keys()
    assert float(found["fake_score, optimizer"][0]) == 1


def test_a_run_that_ends_early_leaves_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_latents(tmp_path / "shards")
    train(settings(tmp_path, name="none", steps=profile.WARMED_UP, profile=True))
    assert f"no profile: it begins with step {profile.WARMED_UP + 1} after a start" in capsys.readouterr().out
    run = train(settings(tmp_path, name="table", steps=profile.WARMED_UP + 2, profile=True))
    assert "profile of 1 steps" in capsys.readouterr().out
    assert not (run / "profile").exists()


def test_utilisation_is_work_over_the_peak() -> None:
    gpu = GPUS["h100-80"]
    assert utilisation(0.4 * 2 * 1e12 * gpu.bf16 * 3.0, gpu, 2, 3.0) == pytest.approx(0.4)


def test_a_gpu_is_known_by_torchs_name() -> None:
    assert known_gpu("NVIDIA H100 80GB HBM3") is GPUS["h100-80"]
    assert known_gpu("NVIDIA H100 PCIe") is None  # a slower one, with another peak
