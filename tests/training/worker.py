"""A process of a launch: does several cases one after the other, through the real command line, with faults in them."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from anyflow_train import __main__ as command_line
from anyflow_train.training.processes import launched
from tests.training.words import LAYERS, ROOT, words

RANK = int(os.environ.get("RANK", "0"))  # `accelerate launch` sets none for one process


def no_compilation() -> None:
    """DeepSpeed would compile a shared-memory module for a CPU, which takes 36 s and changes no bit."""
    import deepspeed.ops

    deepspeed.ops.__dict__["__compatible_ops__"] = {}


def as_on_a_gpu() -> None:
    """Make DeepSpeed do two things that it does on GPUs only.

    It returns a copy of an offloaded moment, so that writes to it have no effect. It disables an autocast around a
    forward unless its config enables one; on a CPU it checks the autocast of a GPU.
    """
    import torch
    from deepspeed import utils

    state, autocast = utils.safe_get_local_optimizer_state, torch.is_autocast_enabled
    utils.safe_get_local_optimizer_state = lambda *arguments: state(*arguments).clone()
    torch.is_autocast_enabled = lambda device="cpu": autocast(device)


def small_messages() -> None:
    """Make buckets so small that the gradients of a small network take several."""
    from anyflow_train.training.engine import replicated

    replicated.BUCKET = 1000


def at_step(step: int, act: Callable[[], Any]) -> None:
    """Do something as soon as the run begins a step."""
    from anyflow_train.training.trainer import Trainer

    original = Trainer._step

    def wrapped(self: Trainer, batches: Any) -> None:
        if self.state.step == step:
            Trainer._step = original
            act()
        original(self, batches)

    Trainer._step = wrapped


def while_loading(step: int, act: Callable[[], Any]) -> None:
    """Do something when the run waits for the data of a step, counted from its start."""
    from anyflow_train.data.loader import Loader

    original = Loader.__iter__

    def wrapped(self: Loader) -> Iterator[Any]:
        for number, batches in enumerate(original(self)):
            if number == step:
                act()
            yield batches

    Loader.__iter__ = wrapped


def note_runs(notes: list[dict[str, Any]]) -> None:
    """Record for every run of this process the final checksum of its parameters, the dtypes of its layers' results,
    and whether its masters share the memory of its weights.
    """
    import torch

    from anyflow_train.training.trainer import Trainer

    original = Trainer.train

    def wrapped(self: Trainer, stream: Any) -> None:
        network = self.recipe.trainables["student"].network
        types: dict[str, set[str]] = {name: set() for name in LAYERS}
        for name, found in types.items():
            note = lambda _layer, _given, result, found=found: found.add(str(result.dtype))  # noqa: E731
            network.get_submodule(name).register_forward_hook(note)
        original(self, stream)
        content = hashlib.sha256()
        for parameter in network.parameters():
            content.update(parameter.detach().flatten().view(torch.uint8).numpy().tobytes())
        results = {name: sorted(found) for name, found in types.items()}
        engine = self.recipe.trainables["student"].engine
        masters, weights = (
            {_place(tensor) for tensor in those} for those in (engine.optimizer.state, engine.shards().values())
        )
        notes.append({"weights": content.hexdigest(), "types": results, "one_copy": masters == weights})

    Trainer.train = wrapped


def _place(tensor: Any) -> int:
    return tensor.untyped_storage().data_ptr()


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def kill(whom: str, number: int) -> None:
    """Send a signal to oneself, to the launcher, or to all processes of the launch."""
    if whom == "all":
        os.killpg(0, number)
    os.kill(os.getppid() if whom == "launcher" else os.getpid(), number)
    if whom == "launcher":
        time.sleep(2)  # what it does about it reaches this process within the step


def flip(run: str, name: str) -> None:
    """Change one bit of a file of the newest checkpoint."""
    file = sorted(Path(run, "checkpoints").glob("step_*"))[-1] / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


FAULTS = {
    "signal": lambda step, whom, number: at_step(step, lambda: kill(whom, number)),
    "hang": lambda step: while_loading(step, lambda: time.sleep(1000)),
    "full": lambda step, size: at_step(step, lambda: limit_files(size)),
    "flip": flip,
    "folder": lambda path: os.chdir(path),
}


def choose_engine(name: str) -> None:
    """Environment variables that `accelerate launch` sets for this file of `launch/`."""
    settings = yaml.safe_load((ROOT / "launch" / f"{name}.yaml").read_text()).get("deepspeed_config")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(settings is not None).lower()
    for key in ("zero_stage", "offload_optimizer_device", "offload_param_device"):
        os.environ[f"ACCELERATE_DEEPSPEED_{key.upper()}"] = str((settings or {}).get(key, "none"))


def do(case: dict[str, Any]) -> int:
    """One run.

    `engine`: another than the launch's. `faults` lists [rank, kind, arguments...], `alone` overrides of one rank,
    [rank, words...].
    """
    if "engine" in case:
        choose_engine(case["engine"])
    for rank, kind, *arguments in case.get("faults", []):
        if rank == RANK:
            FAULTS[kind](*arguments)
    rank, *alone = case.get("alone", [None])
    return command_line.main(["train", *words(case["config"]), *(alone if rank == RANK else [])])


def main(cases: list[dict[str, Any]], results: Path) -> int:
    code, home = 0, os.getcwd()
    notes: list[dict[str, Any]] = []
    note_runs(notes)
    for case in cases:
        notes.clear()
        terminal = os.dup(1), os.dup(2)
        code = do(case)
        os.chdir(home)
        limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        sys.stdout.flush()
        for descriptor in (1, 2):
            os.dup2(terminal[descriptor - 1], descriptor)
        os.environ.pop(launched.TERMINAL, None)
        with results.open("a") as file:
            row = {"case": case["config"]["name"], "rank": RANK, "code": code}
            file.write(json.dumps(row | (notes[-1] if notes else {})) + "\n")
    return code


def work(cases: str, results: str, pids: str) -> NoReturn:
    """Do the cases and leave the process.

    Args:
        cases: a JSON list.
        results, pids: files to add to.
    """
    with Path(pids).open("a") as file:
        file.write(f"{RANK} {os.getpid()}\n")
    command_line._import("anyflow_train.training.run")  # without the garbage collector, as the command does
    signal.signal(signal.SIGINT, signal.default_int_handler)
    small_messages()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        no_compilation()
        as_on_a_gpu()
    launched.exit_process(main(json.loads(cases), Path(results)))


if __name__ == "__main__":
    work(*sys.argv[1:])
