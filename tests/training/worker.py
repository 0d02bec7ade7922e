"""A process of a launch: does several cases one after the other, through the real command line, with faults in them."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from anyflow_train import __main__ as command_line
from anyflow_train.training import launched

RANK = int(os.environ["RANK"])


def no_compilation() -> None:
    """DeepSpeed would compile a shared-memory module for a CPU, which takes 36 s and changes no bit."""
    import deepspeed.ops

    deepspeed.ops.__dict__["__compatible_ops__"] = {}


def overrides(config: dict[str, Any], prefix: str = "") -> list[str]:
    """A nested config as `key=value` words."""
    words = []
    for key, value in config.items():
        if isinstance(value, dict) and value:
            words += overrides(value, f"{prefix}{key}.")
        else:
            words.append(f"{prefix}{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}")
    return words


def meet(folder: Path, number: int) -> None:
    """Every case is a start of its own, with a place to meet of its own, as every launch has."""
    note = folder / f"port_{os.environ['TORCHELASTIC_RUN_ID']}_{os.environ['MASTER_PORT']}_{number}"
    if RANK == 0:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        note.with_suffix(".new").write_text(port)
        note.with_suffix(".new").rename(note)
    while not note.exists():
        time.sleep(0.01)
    os.environ.update(MASTER_PORT=note.read_text(), TORCHELASTIC_USE_AGENT_STORE="False")


def at_step(step: int, act: Any) -> None:
    """Do something as soon as the run begins a step."""
    from anyflow_train.training.trainer import Trainer

    original = Trainer._step

    def wrapped(self: Trainer, batches: Any) -> None:
        if self.state.step == step:
            Trainer._step = original
            act()
        original(self, batches)

    Trainer._step = wrapped


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def do(case: dict[str, Any]) -> int:
    """One run.

    Keys: config; alone: overrides of this rank only, by rank; signal: [rank, step, number]; hang: [rank, step];
    room: [rank, step, bytes] from which on files cannot grow larger.
    """
    alone = case.get("alone", {}).get(str(RANK), [])
    if "signal" in case and case["signal"][0] == RANK:
        at_step(case["signal"][1], lambda: os.kill(os.getpid(), case["signal"][2]))
    if "hang" in case and case["hang"][0] == RANK:
        at_step(case["hang"][1], lambda: time.sleep(1000))
    if "room" in case and case["room"][0] == RANK:
        at_step(case["room"][1], lambda: limit_files(case["room"][2]))
    base = ["student/adapter=full", "student.init=null", "teacher.source=null"]
    return command_line.main(["train", *base, *overrides(case["config"]), *alone])


def main(cases: list[dict[str, Any]], results: Path) -> int:
    code, port = 0, os.environ["MASTER_PORT"]
    for number, case in enumerate(cases):
        terminal = os.dup(1), os.dup(2)
        if len(cases) > 1:
            os.environ["MASTER_PORT"] = port
            meet(results.parent, number)
        code = do(case)
        limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        sys.stdout.flush()
        for descriptor in (1, 2):
            os.dup2(terminal[descriptor - 1], descriptor)
        os.environ.pop(launched.TERMINAL, None)
        with results.open("a") as file:
            file.write(json.dumps({"case": number, "rank": RANK, "code": code}) + "\n")
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        no_compilation()
    sys.exit(main(json.loads(sys.argv[1]), Path(sys.argv[2])))
