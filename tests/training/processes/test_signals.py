"""Stop signals, sent for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from anyflow_train.training.processes.signals import stop_requests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_is_noted_and_the_old_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as request:
        assert request.signal is None
        os.kill(os.getpid(), number)
        assert request.signal is number
        os.kill(os.getpid(), signal.SIGTERM)  # a second signal, as SLURM sends it, changes nothing
    assert signal.getsignal(number) is before


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    code = """
import os, signal, time
from anyflow_train.training.processes.signals import stop_requests
with stop_requests():
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("too late", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 130
    assert ended.stdout == "still here\n"
    assert "stopped immediately" in ended.stderr
