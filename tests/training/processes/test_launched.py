"""Output, end and exit codes of a process that a launcher started, without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anyflow_train.training.processes import launched

ROOT = Path(__file__).resolve().parents[3]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start a process of a launch that runs these statements."""
    prelude = "import os, sys\nfrom pathlib import Path\nfrom anyflow_train.training.processes import launched\n"
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", prelude + code], env=variables, capture_output=True, text=True, timeout=120, check=False
    )


def test_only_process_0_talks_to_the_terminal(tmp_path: Path) -> None:
    code = f"""
launched.send_output_to(Path({str(tmp_path / "logs")!r}))
print("out")
print("err", file=sys.stderr)
os.system("echo child")
launched.tell_terminal("to a person")
"""
    for _ in range(2):
        other = run(code, RANK="3")
        assert (other.stdout, other.stderr) == ("", "to a person\n")
    lines = (tmp_path / "logs" / "process_00003.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("== ")] == ["out", "err", "child"] * 2
    assert lines[0].startswith("== 20")
    assert "process 3 on" in lines[0]
    first = run(code, RANK="0")
    assert (sorted(first.stdout.split()), first.stderr) == (["child", "out"], "err\nto a person\n")
    assert not (tmp_path / "logs" / "process_00000.txt").exists()


def test_a_log_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    result = run(f"launched.send_output_to(Path({str(tmp_path / 'logs')!r}))\nprint('out')", RANK="1")
    assert result.stdout == "out\n"
    assert "process 1 has no log file" in result.stderr


def test_a_process_follows_its_launcher_into_its_death(tmp_path: Path) -> None:
    """The launcher is a shell that starts the process and ends."""
    (tmp_path / "launcher").write_text(str(os.getpid()))
    child = (
        "from anyflow_train.training.processes import launched; import time; "
        "launched.register_with_launcher(); print(1, flush=True); time.sleep(60)"
    )
    shell = subprocess.Popen(
        ["bash", "-c", f'{sys.executable} -c "{child}" & echo $!; wait'],
        env={**os.environ, "PYTHONPATH": str(ROOT), launched.FOLDER: str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert shell.stdout is not None
    process = int(shell.stdout.readline())
    assert shell.stdout.readline() == "1\n"
    assert (tmp_path / "processes").read_text() == f"{process}\n"
    shell.kill()
    shell.wait()
    deadline = time.monotonic() + 120
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_orphan_ends_although_nobody_reads_its_last_message(tmp_path: Path) -> None:
    """The reader of stderr dies together with the launcher, as with `train.sh 2>&1 | tee log` and a killed session."""
    (tmp_path / "launcher").write_text(str(os.getpid()))
    child = (
        "from anyflow_train.training.processes import launched; import time; "
        "launched.register_with_launcher(); print(1, flush=True); time.sleep(60)"
    )
    shell = subprocess.Popen(
        ["bash", "-c", f'{sys.executable} -c "{child}" & echo $!; wait'],
        env={**os.environ, "PYTHONPATH": str(ROOT), launched.FOLDER: str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert shell.stdout is not None
    assert shell.stderr is not None
    process = int(shell.stdout.readline())
    assert shell.stdout.readline() == "1\n"
    shell.stderr.close()
    shell.kill()
    shell.wait()
    deadline = time.monotonic() + 120
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_person_s_own_run_outlives_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launched.FOLDER, raising=False)
    assert launched._launchers({}) == []
    assert launched._launchers({"TORCHELASTIC_RUN_ID": "none"}) == [os.getppid()]


@pytest.mark.parametrize(("everywhere", "code"), [(True, 0), (False, 2)])
def test_the_launch_script_gets_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everywhere: bool, code: int
) -> None:
    monkeypatch.setenv(launched.FOLDER, str(tmp_path))
    assert launched.record_exit_code(2, everywhere) == code
    assert launched.record_exit_code(0, everywhere) == 0
    assert (tmp_path / "codes").read_text() == "2\n"
    monkeypatch.delenv(launched.FOLDER)
    assert launched.record_exit_code(2, everywhere) == 2


def test_a_scheduler_s_signal_before_the_run_began_asks_for_another_start(tmp_path: Path) -> None:
    (tmp_path / "launcher").write_text(str(os.getpid()))
    code = "import signal, time\nlaunched.register_with_launcher()\nos.kill(os.getpid(), signal.SIGUSR1)\ntime.sleep(5)"
    assert run(code, **{launched.FOLDER: str(tmp_path)}).returncode == launched.PREEMPTED
    assert (tmp_path / "codes").read_text() == "75\n"


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        ("UserError('data.shards', 'is gone')", "error: data.shards: is gone (process 3)\n"),
        ("SharedErrors([UserError('data.shards', 'is gone')])", ""),
        ("RuntimeError('a bug')", "error: a process failed; see its log in the run directory (process 3)\n"),
    ],
)
def test_what_one_process_alone_finds_reaches_the_terminal(tmp_path: Path, failure: str, told: str) -> None:
    code = f"""
import types
from anyflow_train import __main__ as command_line
from anyflow_train.errors import SharedErrors, UserError
def fail(overrides, folder):
    launched.send_output_to(Path({str(tmp_path)!r}))
    raise {failure}
sys.modules["fake"] = types.SimpleNamespace(fail=fail)
command_line.COMMANDS["check"] = command_line.Command("", "fake:fail", decoded=False)
sys.exit(command_line.main(["check", "experiment=tiny"]))
"""
    result = run(code, RANK="3", LOCAL_RANK="3")
    assert (result.stdout, result.stderr) == ("", told)
    assert result.returncode == (1 if "bug" in failure else 2)
    assert ("a bug" if "bug" in failure else "error: data.shards: is gone") in (
        tmp_path / "process_00003.txt"
    ).read_text()


@pytest.mark.parametrize(("environment", "ends"), [({"RANK": "0"}, ""), ({}, "interpreter's end\n")])
def test_one_of_several_processes_leaves_without_the_interpreters_own_end(
    environment: dict[str, str], ends: str
) -> None:
    code = """
import atexit
class Left:
    def __del__(self):
        print("interpreter's end")
left = Left()
atexit.register(print, "handler")
print("before")
launched.exit_process(3)
"""
    process = run(code, **environment)
    assert process.returncode == 3, process.stderr
    assert process.stdout == f"before\nhandler\n{ends}"
