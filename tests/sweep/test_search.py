"""`sampler=tpe` searches with Optuna; `cluster=...` gives every run a job of its own."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from anyflow_train.__main__ import main
from anyflow_train.config.commands import SweepOptions
from anyflow_train.errors import UserError
from anyflow_train.sweep import cluster, runner
from anyflow_train.sweep.command import visible_gpus
from anyflow_train.sweep.runner import Runner
from anyflow_train.sweep.search import Search

BASE = ["experiment=tiny", "name=search", "data.shards=shards"]


class Trainings:
    """Stand-in for runs: the validation is the distance of the learning rate to 1e-3, on a logarithmic scale."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.pruned = 0
        self.ends_after = math.inf

    def __call__(
        self,
        runner: Runner,
        arguments: Sequence[str],
        one: object = None,
        stop: Callable[[], bool] | None = None,
    ) -> tuple[int, float]:
        if len(self.rates) >= self.ends_after:
            runner.stopped = True
            return 0, 1.0
        rate = float(one.values["optimizer.lr"])
        self.rates.append(rate)
        one.folder.mkdir(parents=True, exist_ok=True)
        metric, value = one.config.evaluation.best_metric, abs(math.log10(rate) + 3)
        with (one.folder / "metrics.jsonl").open("w") as file:
            for step in (100, 200):
                file.write(json.dumps({"step": step, f"validation/{metric}": value}) + "\n")
                file.flush()
                if stop and stop():
                    self.pruned += 1
                    return 0, 1.0
        done = {"step": one.config.steps, "last_loss": 1.0, "seconds": 1.0, "metrics": {metric: value}}
        (one.folder / "done.json").write_text(json.dumps(done))
        return 0, 1.0


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    found = Trainings()
    monkeypatch.setattr(Runner, "call", lambda *given, **more: found(*given, **more))
    return found


def line(out: Path, *more: str) -> list[str]:
    rates = "optimizer.lr=tag(log,interval(1e-6,1.0))"
    return ["sweep", "sweep.sampler=tpe", *BASE, f"out={out}", rates, *more]


def test_the_search_comes_near_the_best_value_and_ends_hopeless_runs(
    tmp_path: Path, trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line(tmp_path, "trials=25")) == 0
    assert len(trainings.rates) == 25
    distances = [abs(math.log10(rate) + 3) for rate in trainings.rates]
    assert min(distances) < 0.1  # of a range of six decades
    assert trainings.pruned > 0
    said = capsys.readouterr().out
    assert "best: trial-" in said
    assert said.count("| pruned") == trainings.pruned
    table = (tmp_path / "search" / "sweep.md").read_text()
    assert table.count("trial") == 0
    assert len(table.splitlines()) == 27
    assert (tmp_path / "search" / "trial-0000").is_dir()


def test_a_search_goes_on_by_the_same_line(tmp_path: Path, trainings: Trainings) -> None:
    trainings.ends_after = 3
    assert main(line(tmp_path, "trials=6")) == 130
    trainings.ends_after = math.inf
    assert main(line(tmp_path, "trials=6")) == 0
    assert len(list((tmp_path / "search").glob("trial-*/done.json"))) + trainings.pruned == 6
    before = len(trainings.rates)
    assert main(line(tmp_path, "trials=6")) == 0
    assert len(trainings.rates) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["optimizer.lr=1e-3"], "sampler: tpe has nothing to search"),
        (["optimizer.lr=interval(1,0.1)"], "optimizer.lr: 'interval(1,0.1)' is not a range"),
        (["optimizer.lrr=1,2"], "optimizer.lrr: unknown key"),
        (["seed=1,2", "evaluation=none"], "evaluation.every: is 0"),
        (["sampler=random", "seed=1,2"], "sampler: 'random' is wrong: valid are grid, tpe"),
    ],
)
def test_a_mistake_is_said_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["sweep", "sampler=tpe", *BASE, f"out={tmp_path}", *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("extra", ["optuna", "submitit"])
def test_a_missing_extra_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    options = SweepOptions(sampler="tpe", cluster="slurm")
    starts = {
        "optuna": lambda: Search(options, [*BASE, "seed=1,2"], None),
        "submitit": lambda: cluster.finish_all([], options, [], lambda: None),
    }
    with pytest.raises(UserError, match=r"pip install 'anyflow_train\[(search|slurm)\]'"):
        starts[extra]()


def test_every_run_of_a_search_has_a_gpu_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    alone = "echo $CUDA_VISIBLE_DEVICES >> seen\nmkdir gpu$CUDA_VISIBLE_DEVICES || echo shared >> seen\nsleep 0.3\n"
    program.write_text(f"#!/bin/sh\ncd {tmp_path}\n{alone}rmdir gpu$CUDA_VISIBLE_DEVICES\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(program))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert main(line(tmp_path, "trials=4")) == 1
    assert sorted(set((tmp_path / "seen").read_text().split())) == ["5", "7"]


class Run:
    """A run whose training is a command that only says its version."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.folder, self.overrides, self.label, self.state = folder, words, folder.name, "waiting"
        self.cpu_seconds = 0.0

    def update(self, otherwise: str) -> None:
        self.state = otherwise


def test_every_run_is_a_job_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(cluster, "Training", lambda words: Training(words[1:]))
    runs = [Run(tmp_path / "a", ["--version"]), Run(tmp_path / "b", ["sample"])]
    reports: list[int] = []
    cluster.finish_all(runs, SweepOptions(cluster="local", slurm={"timeout_min": 5}), [], lambda: reports.append(1))
    assert [run.state for run in runs] == ["stopped", "failed"]  # of the exit codes 0 and 2
    assert all(run.cpu_seconds > 0 for run in runs)
    assert len(reports) == 2
    assert any("anyflow_train" in path.read_text() for path in (tmp_path / "jobs").glob("*.out"))


Training = cluster.Training


def test_the_signal_for_the_job_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -USR2 $$\nexit 0\n")
    program.chmod(0o755)
    monkeypatch.setattr(cluster.sys, "executable", str(program))
    assert Training([])()[0] == 0


def test_unknown_parameters_of_a_cluster_are_refused(tmp_path: Path) -> None:
    options = SweepOptions(cluster="local", slurm={"colour": 5})
    with pytest.raises(UserError, match="slurm: submitit refuses it"):
        cluster.finish_all([Run(tmp_path / "a", [])], options, [], lambda: None)


def test_visible_gpus_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, found in (("0,3", ["0", "3"]), ("", []), ("-1", []), ("GPU-8f", ["GPU-8f"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        assert visible_gpus() == found
