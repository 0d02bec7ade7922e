"""Sweeps: all combinations checked first, each run once, failures survived, one table."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from anyflow_train.commands import sweep
from anyflow_train.commands.sweep import Combination, plan, table
from anyflow_train.config.compose import compose
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.training.checkpoints.run_directory import RunDirectory
from tests.commands.runs import SHORT
from tests.training.helpers import write_latents

TINY = "experiment=tiny"


def test_every_combination_has_a_directory_of_its_own(tmp_path: Path) -> None:
    given = [TINY, f"out={tmp_path}", "optimizer.lr=1e-3,1e-4", "objective.weight=beta08,uniform", "seed=5"]
    combinations = plan(given, None)
    assert [combination.label for combination in combinations] == [
        "lr=0.001,weight=beta08",
        "lr=0.001,weight=uniform",
        "lr=0.0001,weight=beta08",
        "lr=0.0001,weight=uniform",
    ]
    for combination in combinations:
        assert combination.folder == tmp_path / "tiny" / combination.label
        # What the process is given decodes to what was checked.
        assert compose("train", combination.overrides) == combination.config
    last = combinations[-1].config
    assert (last.optimizer.lr, last.seed) == (1e-4, 5)


def test_labels_are_names_even_where_values_are_not(tmp_path: Path) -> None:
    given = [TINY, f"out={tmp_path}", "data.text_lengths=[16],[16,64]", "student/adapter=lora", "student.init=a"]
    combinations = plan([*given, "data.shards='it is/a',other/b"], None)
    labels = [combination.label for combination in combinations]
    assert len(set(labels)) == 4
    assert labels[0] == "text_lengths=16,shards=it-is-a"
    for combination in combinations:
        assert compose("train", combination.overrides) == combination.config


def test_equal_last_parts_keep_their_whole_key() -> None:
    combinations = plan([TINY, "times.shift=1,5", "evaluation.shift=5"], None)
    assert combinations[0].label == "shift=1"
    combinations = plan([TINY, "times.shift=1,5", "evaluation.shift=1,5"], None)
    assert combinations[1].label == "times.shift=1,evaluation.shift=5"


def test_colliding_labels_are_numbered() -> None:
    combinations = plan([TINY, "data.shards=a/b,a@b"], None)
    assert [combination.label for combination in combinations] == ["000,shards=a-b", "001,shards=a-b"]


def test_errors_of_all_combinations_come_before_the_first_run() -> None:
    with pytest.raises(UserErrors) as caught:
        plan([TINY, "data.frames=17,18,19", "engine.global_batch=32", "engine.micro_batch=32,5", "lr=1"], None)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(set(lines)) == 4
    assert [line.split(":")[0] for line in lines] == ["lr", "engine.global_batch", "data.frames", "data.frames"]


@pytest.mark.parametrize(
    ("given", "where"),
    [
        (["optimizer.lr=1e-3"], "sweep"),
        (["name=a,b"], "name"),
        (["out=a,b", "optimizer.lr=1,2"], "out"),
        (["nothing"], "nothing"),
    ],
)
def test_no_sweep(given: list[str], where: str) -> None:
    with pytest.raises(UserErrors) as caught:
        plan([TINY, *given], None)
    assert caught.value.errors[0].where == where


def test_not_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without a launcher"):
        sweep.run([TINY, "optimizer.lr=1,2"], None)


def test_table_shows_the_best_metrics_family_in_order() -> None:
    metrics = {"energy_distance_16": 0.1, "energy_distance_4": 0.25, "class_error_4": 0.5}
    combinations = plan([TINY, "optimizer.lr=1,2"], None)
    combinations[0].state = "finished"
    combinations[0].summary = {"step": 8, "last_loss": 0.123456, "seconds": 61.4, "metrics": metrics}
    combinations[1].state = "failed"
    assert table(combinations).splitlines() == [
        "| optimizer.lr | state    | last loss | energy_distance_4 | energy_distance_16 | time |",
        "|--------------|----------|-----------|-------------------|--------------------|------|",
        "| 1            | finished | 0.1235    | 0.25              | 0.1                | 61 s |",
        "| 2            | failed   |           |                   |                    |      |",
    ]


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Put a program in the place of Python, and with it of the runs; its starts are noted in `folder/starts`."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport json, pathlib, signal, sys, time\n")
    with path.open("a") as file:
        file.write(f"open({str(folder / 'starts')!r}, 'a').write('started\\n')\n")
        file.write("out, name = (argument.split('=', 1)[1].strip(\"'\") for argument in sys.argv[-2:])\n" + program)
    path.chmod(0o755)
    monkeypatch.setattr(sweep.sys, "executable", str(path))


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text().splitlines())


def states(folder: Path) -> list[str]:
    return [row["state"] for row in json.loads((folder / "sweep.json").read_text())]


def test_a_signal_ends_the_present_run_and_with_it_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends in order on SIGTERM; the second one never starts."""
    program = f"""
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
open({str(tmp_path / "ready")!r}, "w").close()
time.sleep(60)
"""
    stand_in(tmp_path, monkeypatch, program)

    def stop_once_ready() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop_once_ready)
    before = signal.getsignal(signal.SIGTERM)
    watcher.start()
    assert sweep.run([TINY, f"out={tmp_path}", "seed=1,2"], None) == 130
    watcher.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert starts(tmp_path) == 1
    assert states(tmp_path / "tiny") == ["stopped", "waiting"]


def test_failures_are_survived_and_finished_runs_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = """
folder = pathlib.Path(out) / name
folder.mkdir(parents=True, exist_ok=True)
if name == "seed=2" and not (folder / "second").exists():
    (folder / "second").touch()
    sys.exit(3)
done = {"step": 800, "last_loss": 0.5, "seconds": 60.0, "metrics": {"energy_distance_4": 0.25}}
(folder / "done.json").write_text(json.dumps(done))
"""
    stand_in(tmp_path, monkeypatch, program)
    given = [TINY, "steps=800", f"out={tmp_path}", "seed=1,2,3"]
    assert sweep.run(given, None) == 1
    assert states(tmp_path / "tiny") == ["finished", "failed", "finished"]
    assert "failed: seed=2\n" in capsys.readouterr().out
    assert sweep.run(given, None) == 0
    assert states(tmp_path / "tiny") == ["finished"] * 3
    assert starts(tmp_path) == 4
    written = (tmp_path / "tiny" / "sweep.md").read_text()
    assert written in capsys.readouterr().out
    assert written.count("0.25") == 3
    # More steps than a finished run has: it goes on.
    assert sweep.run([*given, "steps=801"], None) == 130
    assert starts(tmp_path) == 5


def test_a_changed_key_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "")
    given = [TINY, f"out={tmp_path}", "seed=1,2"]
    combination = plan(given, None)[1]
    combination.folder.mkdir(parents=True)
    RunDirectory(combination.folder).begin(combination.config)
    with pytest.raises(UserErrors, match=r"optimizer.lr: is 0.5, but the run began with .*tiny/seed=2"):
        sweep.run([*given, "optimizer.lr=0.5"], None)
    assert not (tmp_path / "starts").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_sweep(tmp_path: Path) -> None:
    write_latents(tmp_path / "shards")
    assert sweep.run([*SHORT, f"out={tmp_path}", f"data.shards={tmp_path}/shards", "log_every=1,2"], None) == 0
    rows = json.loads((tmp_path / "tiny" / "sweep.json").read_text())
    assert [(row["state"], row["step"]) for row in rows] == [("finished", 2)] * 2
    # The second one reports the mean over both steps; seconds are those of training, not of the start.
    assert rows[0]["last_loss"] != rows[1]["last_loss"] > 0


def test_folder_is_where_the_trainer_puts_the_run(tmp_path: Path) -> None:
    combination: Combination = plan([TINY, f"out={tmp_path}", "seed=1,2"], None)[0]
    assert RunDirectory.of(combination.config).path == combination.folder
