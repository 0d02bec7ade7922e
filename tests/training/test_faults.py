"""Everything that can go wrong with one of two processes, done to real launches."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from anyflow_train.training.checkpoints.reading import list_checkpoints, read_info
from tests.training.helpers import assert_equal_runs, final_tensors, write_latents
from tests.training.launched import PATIENCE, Launch, Start, accelerate, fork, train_case
from tests.training.words import ROOT, words

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data."""
    folder = tmp_path_factory.mktemp("faults")
    write_latents(folder / "here" / "shards")
    write_latents(folder / "poisoned", samples=40, poison=(7,))
    write_latents(folder / "elsewhere" / "shards", samples=21)
    return folder


@pytest.fixture(scope="module", params=["ddp", "zero2"])
def launch(folder: Path, request: pytest.FixtureRequest) -> Launch:
    """Do an undisturbed run, and two with a sample that is not finite, in one launch."""
    place = folder / request.param
    place.mkdir()
    poisoned = {"steps": 5, "data__shards": str(folder / "poisoned")}
    cases = [
        case(folder, place, "whole"),
        case(folder, place, "poisoned", **poisoned),
        case(folder, place, "bf16", **poisoned, engine__precision="bf16"),
    ]
    launch = Launch(fork, request.param, cases, place)
    assert launch.ended() == 0, launch.text()
    assert read_info(list_checkpoints(place / "whole" / "checkpoints")[-1]).state.step == STEPS  # others equal it
    return launch


@pytest.fixture(scope="module")
def resumed(folder: Path, request: pytest.FixtureRequest) -> Launch:
    """Do all cases that end early, but well, in one launch. A repeated name is a run that is started again."""
    place = folder / f"{request.param}-resumed"
    place.mkdir()
    cases = [
        case(folder, place, "full", [0, "full", 4, 10_000]),
        case(folder, place, "full"),
        case(folder, place, "preempted", [1, "signal", 3, "itself", signal.SIGUSR1]),
        case(folder, place, "preempted"),
    ]
    launch = Launch(fork, request.param, cases, place)
    assert launch.ended() == 0, launch.text()
    return launch


# The agreement on the last step, and the writing by one process, are the same under every engine.
OF_EACH = pytest.mark.parametrize(
    ("launch", "resumed"), [("ddp", "ddp"), pytest.param("zero2", "zero2", marks=pytest.mark.nightly)], indirect=True
)


def case(folder: Path, place: Path, name: str, *faults: list[Any], **changes: Any) -> dict[str, Any]:
    common = {"name": name, "steps": STEPS, "data__shards": str(folder / "here" / "shards")}
    return train_case(place, *faults, **{**common, **changes})


def test_one_process_talks_to_the_terminal_and_the_others_to_their_logs(launch: Launch) -> None:
    assert launch.codes("whole") == [0, 0]
    log = (launch.folder / "whole" / "logs" / "process_00001.txt").read_text()
    assert log.startswith("== 20")
    assert "pid" in log.splitlines()[0]
    assert f"step {STEPS}/{STEPS}" in log
    assert launch.text().split("finished")[0].count(f"step {STEPS}/{STEPS}") == 1


@OF_EACH
def test_a_full_disk_ends_the_run_with_its_reason_and_costs_the_steps_since_the_last_save(
    launch: Launch, resumed: Launch
) -> None:
    # 2: a sentence for the user, from every process; then started again, with room
    assert sorted(resumed.codes("full")) == [0, 0, 2, 2]
    text = resumed.text()
    failed = re.findall(r"the checkpoint of step (\d+) could not be written \(File too large\)", text)
    assert failed in (["6"], ["4"])  # 4 if it was still on its way to the disk when that became full
    last = f"step_{int(failed[0]) - 2:08d}"
    assert f"resuming from {resumed.folder / 'full' / 'checkpoints' / last}" in text
    assert_equal_runs(resumed.folder / "full", launch.folder / "whole")
    assert list((resumed.folder / "full" / "checkpoints").glob(".*")) == []


@OF_EACH
def test_a_scheduler_s_signal_to_one_process_stops_all_after_the_same_step(launch: Launch, resumed: Launch) -> None:
    assert sorted(resumed.codes("preempted")) == [0, 0, 75, 75]
    assert f"stopped after step 4 of {STEPS}" in resumed.text()
    assert_equal_runs(resumed.folder / "preempted", launch.folder / "whole")


@pytest.mark.parametrize("name", ["poisoned", "bf16"])
def test_a_loss_that_is_not_finite_on_one_process_is_skipped_on_all(launch: Launch, name: str) -> None:
    rows = launch.results(name)
    assert [row["code"] for row in rows] == [0, 0]
    assert len({row["weights"] for row in rows}) == 1
    info = read_info(list_checkpoints(launch.folder / name / "checkpoints")[-1])
    assert (info.state.skipped, info.adam_steps) == (1, {"student": 4})
    assert all(tensor.isfinite().all() for tensor in final_tensors(launch.folder / name).values())
    assert launch.text().count("samples: clip-007; skipped") == 2  # once for each precision


@pytest.fixture(scope="module")
def refused(folder: Path) -> Launch:
    """Processes that do not fit each other; then a run that a person stops, and whose newest checkpoint decays."""
    place = folder / "refused"
    place.mkdir()
    for path in (place / "unwritable" / "lock", place / "unreadable" / "config.json"):
        path.mkdir(parents=True)  # root may open any file, but not a folder
    moved = [0, "folder", str(folder / "here")], [1, "folder", str(folder / "elsewhere")]
    cases = [
        {**case(folder, place, "config"), "alone": [1, "seed=7", "engine.precision=bf16"]},
        case(folder, place, "manifest", *moved, data__shards="shards"),
        case(folder, place, "unwritable"),
        case(folder, place, "unreadable"),
        case(folder, place, "stopped", [0, "signal", 4, "itself", signal.SIGTERM]),
        case(folder, place, "stopped", [0, "flip", str(place / "stopped"), "exp_avg-00001.safetensors"]),
    ]
    launch = Launch(fork, "ddp", cases, place)
    assert launch.ended() == 0, launch.text()
    return launch


def test_processes_with_other_configs_end_with_one_line_a_key(refused: Launch) -> None:
    assert refused.codes("config") == [2, 2]
    lines = [line for line in refused.text().splitlines() if "on process 0, but" in line][:2]
    assert lines == [
        "error: seed: is 0 on process 0, but 7 on process 1; give all processes the same",
        'error: engine.precision: is "fp32" on process 0, but "bf16" on process 1; give all processes the same',
    ]


def test_processes_with_other_data_are_refused(refused: Launch) -> None:
    assert refused.codes("manifest") == [2, 2]
    assert refused.text().count("error: data.shards: is a manifest of 20 samples") == 1
    assert "but a manifest of 21 samples" in refused.text()


def test_a_file_that_only_process_0_opens_ends_all_with_its_name(refused: Launch) -> None:
    assert refused.codes("unwritable") == refused.codes("unreadable") == [2, 2]
    text = refused.text()
    assert text.count(f"error: {refused.folder / 'unwritable'}: cannot be written (Is a directory)") == 1
    config = refused.folder / "unreadable" / "config.json"
    assert text.count(f"error: {config}: cannot be read or written (is not a regular file)") == 1


@pytest.mark.parametrize("launch", ["ddp"], indirect=True)
def test_a_stop_is_no_failure_and_a_damaged_checkpoint_gives_way(launch: Launch, refused: Launch) -> None:
    assert refused.codes("stopped") == [0, 0, 0, 0]
    text, run = refused.text(), refused.folder / "stopped"
    assert "SIGTERM: finishing this step" in text
    assert f"stopped after step 5 of {STEPS}" in text
    assert "step_00000005/exp_avg-00001.safetensors: does not match its checksum" in text
    assert f"resuming from {run / 'checkpoints' / 'step_00000004'}" in text
    assert_equal_runs(run, launch.folder / "whole")


def killed(start: Start, engine: str, folder: Path, place: Path, *fault: Any) -> Launch:
    """The run of this module's `whole` with a fault in it."""
    launch = Launch(start, engine, [case(folder, place, "killed", *([list(fault)] if fault else []))], place)
    workers: dict[int, int] = {}
    launch.wait_for(lambda: workers.update(launch.workers()) or len(workers) == 2)
    code = launch.ended()
    assert (code == 0) == (not fault)
    # Nobody may be left: not to train on, and not to hold the lock.
    deadline = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{pid}").exists() for pid in workers.values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return launch


@pytest.mark.parametrize("launch", ["ddp", pytest.param("zero2", marks=pytest.mark.nightly)], indirect=True)
def test_a_run_that_is_killed_three_times_ends_bit_equal(folder: Path, launch: Launch) -> None:
    """First one of its processes, then its launcher, then all."""
    engine = launch.folder.name
    place = folder / f"{engine}-killed"
    place.mkdir()
    one = killed(fork, engine, folder, place, 1, "signal", 3, "itself", signal.SIGKILL)
    assert "lost contact with another process; start again" in one.text()
    killed(fork, engine, folder, place, 0, "signal", 4, "launcher", signal.SIGKILL)
    killed(fork, engine, folder, place, 1, "signal", 6, "all", signal.SIGKILL)
    assert "resuming from" in killed(fork, engine, folder, place).text()
    assert_equal_runs(place / "killed", launch.folder / "whole")


@pytest.mark.nightly  # faster: the case before it, and the launch script, which starts this launcher
@pytest.mark.parametrize("launch", ["ddp"], indirect=True)
def test_accelerate_s_launcher_is_killed_and_terminated(folder: Path, launch: Launch) -> None:
    place = folder / "accelerate"
    place.mkdir()
    killed(accelerate, "ddp", folder, place, 0, "signal", 4, "launcher", signal.SIGKILL)
    stopped = killed(
        accelerate, "ddp", folder, place, 0, "signal", 5, "launcher", signal.SIGTERM
    )  # it makes every code a 1
    assert "resuming from" in stopped.text()
    assert f"stopped after step 6 of {STEPS}" in stopped.text()
    assert_equal_runs(place / "killed", launch.folder / "whole", step=6)


def test_the_launch_script_passes_the_signal_on_and_asks_for_another_start(folder: Path) -> None:
    place = folder / "script"
    config = case(folder, place, "run", steps=10_000, checkpoint__every=10_000)["config"]
    log = folder / "script.txt"
    variables = {"NPROC": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with log.open("wb") as file:
        command = [str(ROOT / "launch" / "train.sh"), "ddp", *words(config)]
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **variables, "PATH": path})
    deadline = time.monotonic() + PATIENCE
    while "step 3/" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE) == 75
    text = log.read_text()
    assert "Traceback" not in text  # the launcher has nothing to say
    step = int(text.split("stopped after step ")[1].split()[0])
    assert [path.name for path in list_checkpoints(place / "run" / "checkpoints")] == [f"step_{step:08d}"]
