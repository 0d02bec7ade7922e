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

from anyflow_train.config.compose import compose
from anyflow_train.config.paths import asset
from anyflow_train.data.fingerprint import component_fingerprint
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.sweep import command as sweep
from anyflow_train.sweep import runner
from anyflow_train.sweep.combinations import Combination, combine, equalise, split_options
from anyflow_train.sweep.command import table
from anyflow_train.training.checkpoints.run_directory import RunDirectory
from tests.evaluation.test_evaluate import write_held_out

TINY = "experiment=tiny"


def plan(arguments: list[str], config_dir: None) -> list[Combination]:
    options, rest = split_options(arguments, config_dir)
    return combine(options, rest, config_dir)


def test_every_combination_has_a_directory_of_its_own(tmp_path: Path) -> None:
    given = [TINY, f"out={tmp_path}", "optimizer.lr=1e-3,1e-4", "objective.weight=beta08,uniform", "seed=5"]
    combinations = plan(given, None)
    assert [combination.label for combination in combinations] == [
        "lr-0.001_weight-beta08",
        "lr-0.001_weight-uniform",
        "lr-0.0001_weight-beta08",
        "lr-0.0001_weight-uniform",
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
    assert labels[0] == "text_lengths-16_shards-it-is-a"
    for combination in combinations:
        assert compose("train", combination.overrides) == combination.config


def test_equal_last_parts_keep_their_whole_key() -> None:
    combinations = plan([TINY, "times.shift=1,5", "evaluation.shift=5"], None)
    assert combinations[0].label == "shift-1"
    combinations = plan([TINY, "times.shift=1,5", "evaluation.shift=1,5"], None)
    assert combinations[1].label == "times.shift-1_evaluation.shift-5"


def test_colliding_labels_are_numbered() -> None:
    combinations = plan([TINY, "data.shards=a/b,a@b"], None)
    assert [combination.label for combination in combinations] == ["000_shards-a-b", "001_shards-a-b"]


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
    combinations[0].cpu_seconds = 55.2
    combinations[1].state = "failed"
    assert table(combinations).splitlines() == [
        "| optimizer.lr | state    | steps | last loss | energy_distance_4 | energy_distance_16 | time | CPU time |",
        "|--------------|----------|-------|-----------|-------------------|--------------------|------|----------|",
        "| 1            | finished | 400   | 0.1235    | 0.25              | 0.1                | 61 s | 55 s     |",
        "| 2            | failed   | 400   |           |                   |                    |      |          |",
    ]


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Put a program in the place of Python, and with it of the runs; its starts are noted in `folder/starts`."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport json, pathlib, signal, sys, time\n")
    with path.open("a") as file:
        file.write(f"open({str(folder / 'starts')!r}, 'a').write('started\\n')\n")
        file.write("out, name = (argument.split('=', 1)[1].strip(\"'\") for argument in sys.argv[-2:])\n" + program)
    path.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(path))


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
if name == "seed-2" and not (folder / "second").exists():
    (folder / "second").touch()
    sys.exit(3)
done = {"step": 800, "last_loss": 0.5, "seconds": 60.0, "metrics": {"energy_distance_4": 0.25}}
(folder / "done.json").write_text(json.dumps(done))
"""
    stand_in(tmp_path, monkeypatch, program)
    given = [TINY, "steps=800", f"out={tmp_path}", "seed=1,2,3"]
    assert sweep.run(given, None) == 1
    assert states(tmp_path / "tiny") == ["finished", "failed", "finished"]
    assert "failed: seed-2\n" in capsys.readouterr().out
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
    with pytest.raises(UserErrors, match=r"optimizer.lr: is 0.5, but the run began with .*tiny/seed-2"):
        sweep.run([*given, "optimizer.lr=0.5"], None)
    assert not (tmp_path / "starts").exists()


def test_arms_are_combined_with_all_values(tmp_path: Path) -> None:
    arms = ["arms.plain=[]", "arms.short=['objective=semigroup','steps=7']"]
    combinations = plan([TINY, f"out={tmp_path}", *arms, "seed=1,2", "train=['steps=9','seed=5']"], None)
    assert [one.label for one in combinations] == ["plain_seed-1", "plain_seed-2", "short_seed-1", "short_seed-2"]
    assert [one.group for one in combinations] == ["plain", "plain", "short", "short"]
    assert [(one.config.steps, one.config.objective.kind) for one in combinations[1:3]] == [
        (9, "lagrangian"),
        (7, "semigroup"),
    ]
    for one in combinations:
        assert compose("train", one.overrides) == one.config


def test_an_error_of_an_arm_names_it() -> None:
    with pytest.raises(UserErrors) as caught:
        plan([TINY, "arms.a=['objective.epsilon=2']", "arms.b=[]", "jobs=1"], None)
    assert [error.where for error in caught.value.errors] == ["arms.a: objective.epsilon"]
    with pytest.raises(UserErrors) as caught:
        plan([TINY, "arms.b=[]", "jobs=0"], None)
    assert [error.where for error in caught.value.errors] == ["jobs"]


def test_equal_operations() -> None:
    """A step of the semigroup takes fewer operations than one of the flow map, so its run has more steps."""
    flow_map = "arms.eulerian=['objective=flow_map','objective.velocity=teacher']"
    changes = "{steps:10,changes:{times.diffusion_share:1.0,times.consistency_share:0.0}}"
    short = f"arms.scheduled=['objective=semigroup','objective.schedule=[{changes}]']"
    found = plan([TINY, flow_map, short, "arms.semigroup=['objective=semigroup']", "steps=100"], None)
    equalise(found)
    eulerian, scheduled, semigroup = found
    assert eulerian.config.steps == 100 < semigroup.config.steps < scheduled.config.steps
    for one in found:
        assert one.operations is not None
        assert eulerian.operations is not None
        # Rounding to whole steps changes a run by half a step at most.
        assert abs(one.operations / eulerian.operations - 1) < 0.5 / 100 + 1e-9
        assert compose("train", one.overrides) == one.config


def test_runs_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run waits for the other one's file, so one after the other would never end."""
    program = """
folder = pathlib.Path(out)
(folder / name).mkdir(parents=True)
while len([path for path in folder.iterdir() if path.is_dir()]) < 2:
    time.sleep(0.01)
print("side by side")
(folder / name / "done.json").write_text(json.dumps({"step": 400, "last_loss": 0.5, "seconds": 1.0, "metrics": {}}))
"""
    stand_in(tmp_path, monkeypatch, program)
    assert sweep.run([TINY, f"out={tmp_path}", "seed=1,2", "jobs=2"], None) == 0
    assert (tmp_path / "tiny" / "seed-1.log").read_text() == "side by side\n"
    first = json.loads((tmp_path / "tiny" / "sweep.json").read_text())[0]["cpu_seconds"]
    # Finished runs are not started again and keep their cost.
    assert sweep.run([TINY, f"out={tmp_path}", "seed=1,2", "jobs=2"], None) == 0
    assert json.loads((tmp_path / "tiny" / "sweep.json").read_text())[0]["cpu_seconds"] == first > 0
    for damaged in ("[{", "{}", "[3]", '[{"label": "seed-1", "cpu_seconds": null}]'):
        (tmp_path / "tiny" / "sweep.json").write_text(damaged)
        assert sweep.run([TINY, f"out={tmp_path}", "seed=1,2", "jobs=2"], None) == 0


def test_missing_held_out_clips_are_named_before_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "")
    evaluate = ["experiment=tiny_evaluate", f"held_out={tmp_path}/none"]
    with pytest.raises(UserError, match=r"evaluate: held_out: '.*none' has no manifest\.json"):
        sweep.run([TINY, f"out={tmp_path}", "seed=1,2", f"evaluate={evaluate}"], None)
    evaluate = ["experiment=tiny_evaluate", f"held_out={write_held_out(tmp_path / 'few', 8)}"]
    with pytest.raises(UserError, match=r"evaluate: held_out: '.*few' holds 8 clips, but held_out_samples=288"):
        sweep.run([TINY, f"out={tmp_path}", "seed=1,2", f"evaluate={evaluate}"], None)
    assert not (tmp_path / "starts").exists()


def test_the_shipped_board_composes() -> None:
    found = plan(["experiment=board"], None)
    assert len(found) == 3 * len({one.group for one in found}) >= 15


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_sweep(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two runs of the embedded student are trained and evaluated together; a second start finds both finished."""
    shards = write_held_out(tmp_path / "shards", 8)
    manifest = (shards / "manifest.json").read_text()
    own_vae = component_fingerprint(asset("tiny-wan"), "vae")
    (shards / "manifest.json").write_text(manifest.replace('"abc"', f'"{own_vae}"'))
    small = ["samples=4", "held_out_samples=8", "calls=[1]", "fine_steps=1", "bootstrap=9", "videos=0", "oracle=none"]
    evaluate = ["experiment=tiny_evaluate", f"held_out={shards}", *small]
    given = [TINY, f"out={tmp_path}", f"data.shards={shards}", "evaluation=none", "log_every=1,2", "steps=2"]
    given += ["engine.global_batch=8", "engine.micro_batch=8", "data.text_lengths=[16]"]
    given += ["data.frames=5", "data.height=32", "data.width=32"]
    given += [f"evaluate={evaluate}"]
    assert sweep.run(given, None) == 0
    folder = tmp_path / "tiny"
    rows = json.loads((folder / "sweep.json").read_text())
    assert [(row["state"], row["step"]) for row in rows] == [("finished", 2)] * 2
    # The second one reports the mean over both steps; seconds are those of training, not of the start.
    assert rows[0]["last_loss"] != rows[1]["last_loss"] > 0
    written = (folder / "board.md").read_text()
    assert written in capfd.readouterr().out
    assert [line.split("|")[1].strip() for line in written.splitlines()[2:5]] == [
        "teacher",
        "log_every=1",
        "log_every=2",
    ]
    before = (folder / "evaluation" / "report.json").stat().st_mtime_ns
    assert sweep.run(given, None) == 0
    assert (folder / "evaluation" / "report.json").stat().st_mtime_ns == before


def test_folder_is_where_the_trainer_puts_the_run(tmp_path: Path) -> None:
    combination: Combination = plan([TINY, f"out={tmp_path}", "seed=1,2"], None)[0]
    assert RunDirectory.of(combination.config).path == combination.folder
