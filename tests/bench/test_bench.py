"""`anyflow bench` on a CPU: what its parts find, what it reports, and what becomes of a part that fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from anyflow_train.__main__ import main as anyflow
from anyflow_train.bench import checks, command
from anyflow_train.bench.notes import Notes
from anyflow_train.config.commands.bench import BenchPart


def part(name: str, folder: Path) -> dict[str, Any]:
    """Rehearse one part in this process."""
    file = folder / f"{name}.json"
    command.main(name, str(file), "100", "True", *command.PARTS[name].settings)
    return json.loads(file.read_text())


def test_every_part_can_be_chosen() -> None:
    assert tuple(command.PARTS) == get_args(BenchPart)


def test_what_is_compared_with_a_cpu_runs_on_the_gpu() -> None:
    """The tiny experiments choose the CPU themselves; compared with itself, it is always right."""
    assert {name for name, words in checks.RUNS.items() if checks._tiny(words).engine.device != "auto"} == set()


def test_without_a_gpu_only_a_rehearsal_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert anyflow(["bench", f"out={tmp_path}"]) == 2
    assert "rehearse: false, but torch finds no GPU; rehearse=true" in capsys.readouterr().err


def test_wrong_settings_are_found_before_the_first_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "_one", lambda *_: {"state": "passed"})
    bench = ["bench", "rehearse=true", f"out={tmp_path / 'own'}", 'settings=["engine.no=1","data.height=72"]']
    assert anyflow(bench) == 2
    error = capsys.readouterr().err
    assert re.findall("error: (.*?: .*?:)", error) == ["settings: engine.no:", "settings: data.height:"]
    assert not (tmp_path / "own").exists()
    assert anyflow([*bench, "only=[machine]"]) == 0  # no measured step, which alone takes them


def test_files_of_the_user_are_never_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "_one", lambda *_: {"state": "passed"})
    bench = ["bench", "rehearse=true", "only=[machine]", f"out={tmp_path / 'own'}"]
    assert anyflow(bench) == 0
    assert anyflow(bench) == 0  # its own files are replaced
    for name in ("bench.json", "bench.md", "machine.txt"):
        (mine := tmp_path / name).write_text("{}")
        assert anyflow([*bench[:-1], f"out={tmp_path}"]) == 2
        assert f"out: '{mine}' exists, and this command did not write it" in capsys.readouterr().err
        assert mine.read_text() == "{}"
        mine.unlink()


@pytest.mark.parametrize(("difference", "wrong"), [(1e-5, False), (1e-3, True), (float("nan"), True)])
def test_a_difference_above_its_limit_is_wrong(difference: float, wrong: bool, tmp_path: Path) -> None:
    Notes(tmp_path / "notes.json", 1).check("output", difference, 1e-4)
    assert ("wrong" in json.loads((tmp_path / "notes.json").read_text())) == wrong


def test_attention_agrees_with_its_formula(tmp_path: Path) -> None:
    found = part("attention", tmp_path)
    assert float(found["flash"]) < 0.01
    assert found.keys() == {"flash", "flash, 256 keys", "flash, 64 keys"}


@pytest.mark.nightly  # the parts are the steps of benchmarks/step.py, which the suite runs
def test_both_ways_make_steps_and_only_ours_has_fewer_operations_than_it_computes(tmp_path: Path) -> None:
    ours, published = part("full", tmp_path), part("published", tmp_path)
    for found in (ours, published):
        assert found["steps"] == 3
        assert found["seconds"] > 0
        assert "wrong" not in found
    assert ours["tflop"] == published["tflop"]  # the work of the method, which both are measured by


def test_the_report() -> None:
    step = {"state": "passed", "took": 50.0, "attention": "cudnn", "first_step": 20.0, "steps": 3, "gib": 30.0}
    found = {
        "machine": {"state": "passed", "took": 5.0, "device": "NVIDIA H100", "torch": "2.11", "copies": "2.6 TB/s"},
        "kernels": {"state": "failed", "took": 9.0, "wrong": "exit code -11; see kernels.txt"},
        "eager": {**step, "seconds": 12.0, "mfu": 0.5, "planned_gib": 31.0},
        "full": {**step, "seconds": 5.0, "mfu": 0.5, "planned_gib": 31.0},
        "published": {**step, "seconds": 10.0, "mfu": 0.25, "planned_gib": 31.0},
    }
    lines = [re.sub(" +", " ", line) for line in command.report(found, False).splitlines()]
    assert lines[0] == "# NVIDIA H100, torch 2.11"
    assert "| eager | 12 | | 50% | 30.00 | 31.00 | cudnn | 20 |" in lines
    assert "| full | 5 | 2.00x | 50% | 30.00 | 31.00 | cudnn | 20 |" in lines
    assert "| published | 10 | 1.00x | 25% | 30.00 | | cudnn | 20 |" in lines  # the plan is of our network
    assert "* copies: 2.6 TB/s" in lines
    assert "exit code -11; see kernels.txt" in command.report(found, False)


@pytest.mark.nightly
def test_a_part_that_fails_loses_nothing_but_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        f"out={tmp_path}",
        "rehearse=true",
        "only=[machine,eager,attention]",
        'settings=["engine.device=cuda"]',
    ]
    assert anyflow(["bench", *arguments]) == 1
    parts = json.loads((tmp_path / "bench.json").read_text())["parts"]
    assert {name: found["state"] for name, found in parts.items()} == {
        "machine": "passed",
        "eager": "failed",
        "attention": "passed",
    }
    assert "engine.device" in (tmp_path / "eager.txt").read_text()
    assert (tmp_path / "bench.md").read_text() in capsys.readouterr().out


@pytest.mark.nightly
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_steps_and_a_checkpoint_under_zero(strategy: str, tmp_path: Path) -> None:
    """In a process of its own, because DeepSpeed keeps its state; on a CPU the benchmark itself leaves them out."""
    program = (
        "import sys, pathlib\n"
        "from anyflow_train.bench.checks import zero_steps\n"
        "from anyflow_train.bench.notes import Notes\n"
        "from tests.training.worker import no_compilation\n"
        "no_compilation()\n"
        "zero_steps(Notes(pathlib.Path(sys.argv[1]), 100))\n"
    )
    file, variables = tmp_path / "found.json", command.launcher_of_one_process(command.PARTS[strategy])
    subprocess.run([sys.executable, "-c", program, str(file)], env={**os.environ, **variables}, check=True)
    found = json.loads(file.read_text())
    assert found["checkpoint"] == "saved"
    assert "wrong" not in found
