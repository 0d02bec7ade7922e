"""The lock of a run directory, between real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from anyflow_train.errors import UserError
from anyflow_train.training.checkpoints import run_directory
from anyflow_train.training.checkpoints.run_directory import RunDirectory

HOLD = """
import os, sys, time
from pathlib import Path
from anyflow_train.training.checkpoints.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).locked():
    if os.fork() == 0:  # a data worker that outlives its parent
        time.sleep(3)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_start_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"process {holder.pid} on \S+"), RunDirectory(tmp_path).locked():
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with RunDirectory(tmp_path).locked():
        assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_the_lock_is_free_again_after_the_block(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "new" / "run")
    for _ in range(2):
        with directory.locked():
            assert directory.path.is_dir()


def test_processes_that_see_another_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "SHARED_SECONDS", 0.3)
    with RunDirectory(tmp_path / "here").locked() as start:
        other = RunDirectory(tmp_path / "elsewhere")
        with pytest.raises(UserError, match=r"elsewhere: on \S+ is not the run directory of process 0"):
            other.check_shared(start)
        other.path.mkdir()
        (other.path / "lock").write_bytes((tmp_path / "here" / "lock").read_bytes())
        other.check_shared(start)
        with pytest.raises(UserError):  # an earlier start's
            other.check_shared("0123")


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another out"), RunDirectory(tmp_path / "file" / "run").locked():
        pass


def test_a_folder_for_checkpoints_that_cannot_be_written_is_found_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").write_text("x")
    with pytest.raises(UserError, match=r"cannot be written \(File exists\)"), RunDirectory(tmp_path).locked():
        pass
    (tmp_path / "checkpoints").unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root
    with pytest.raises(UserError, match=r"checkpoints: cannot be written"), RunDirectory(tmp_path).locked():
        pass


@pytest.mark.parametrize("name", ["config.json", "done.json", "inputs.json"])
def test_deep_json_and_a_fifo_in_a_run_directory_are_neither_a_traceback_nor_a_hang(tmp_path: Path, name: str) -> None:
    directory = RunDirectory(tmp_path)
    read = {
        "config.json": directory.read_config,
        "done.json": directory.read_done,
        "inputs.json": directory.read_inputs,
    }
    (tmp_path / name).write_text("[" * 100_000)
    assert not read[name]()
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with suppress(OSError):
        read[name]()
