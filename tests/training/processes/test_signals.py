"""Stop signals, sent for real."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from anyflow_train.training.processes.signals import stop_requests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_signal_is_noted_and_the_old_handler_comes_back(number: signal.Signals) -> None:
    began = signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    before = signal.getsignal(number)
    with stop_requests() as request:
        assert request.signal is None
        os.kill(os.getpid(), number)
        assert request.signal is number
        os.kill(os.getpid(), signal.SIGTERM)  # a second signal, as SLURM sends it, changes nothing
    assert signal.getsignal(number) is before
    signal.signal(number, began)


@pytest.mark.parametrize("read", [True, False])
def test_a_second_interrupt_ends_the_process_at_once(read: bool) -> None:
    code = """
import os, signal, sys, time
from anyflow_train.training.processes.signals import stop_requests
if len(sys.argv) > 1:  # the reader of stderr has ended
    os.dup2((pipe := os.pipe())[1], 2)
    os.close(pipe[0])
with stop_requests():
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("too late", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", code, *([] if read else ["unread"])], capture_output=True, text=True)
    assert ended.returncode == 130
    assert ended.stdout == "still here\n"
    assert ("stopped immediately" in ended.stderr) is read


def test_a_run_under_nohup_ignores_a_closed_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_does_not_stop_the_saving() -> None:
    """The process has a terminal, which is closed; it receives the kernel's SIGHUP and prints afterwards."""
    code = """
import signal, sys, time
from anyflow_train.training.processes.signals import stop_requests
from anyflow_train.training.reporting.progress import StepProgress
with stop_requests() as request:
    progress = StepProgress(3, 0)
    progress.say("ready")
    end = time.monotonic() + 60
    while request.signal is None and time.monotonic() < end:
        time.sleep(0.01)
    for _ in range(3):
        progress.say("saving")
        progress.advance()
    print("also here", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write(request.signal.name)
"""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "saved"
        child, terminal = pty.fork()
        if child == 0:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
            os.execv(sys.executable, [sys.executable, "-c", code, str(saved)])
        shown = b""
        while b"ready" not in shown:  # the bar hides the cursor first
            shown += os.read(terminal, 1000)
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert saved.read_text() == "SIGHUP"


def test_a_signal_ends_a_wait_and_threads_that_never_end() -> None:
    code = """
import os, signal, threading
from concurrent.futures import ThreadPoolExecutor
from anyflow_train.training.processes import signals
signals.ENDING_SECONDS = 0.5
pool = ThreadPoolExecutor(1)
with signals.stop_requests() as stop:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        with stop.interrupting():
            pool.submit(threading.Event().wait).result()
    except signals.WaitInterrupted:
        print("saved", flush=True)
    stop.end_soon()
pool.shutdown()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (ended.returncode, ended.stdout) == (75, "saved\n")
