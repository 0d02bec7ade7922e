"""Kill a run of two processes repeatedly at random, and check that it ends like an undisturbed run.

python tests/soak/soak.py [--kills 20] [--steps 200] [--engine zero2] [--seed N] [--folder FOLDER]

Every kill sends SIGKILL to one process, the launcher, or all of them, after a random number of new steps. Every second
kill is during a save. The last line has the result; the exit code is 0 if weights, averages and moments are equal bit
for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from anyflow_train.training.checkpoints.reading import list_checkpoints, read_info
from tests.training.helpers import final_tensors, write_latents
from tests.training.launched import Launch, accelerate, train_case

SAVE_EVERY = 5


def main() -> int:
    options = arguments()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    write_latents(folder / "shards")
    dice, began = random.Random(options.seed), time.monotonic()
    start(options, folder, "whole").ended(options.patience)
    done: Counter[str] = Counter()
    starts = 0
    while sum(done.values()) < options.kills:
        starts += 1
        whom, in_save = dice.choice(["process 0", "process 1", "launcher", "all"]), bool(starts % 2)
        # So that all kills together about fill the run, and none is left over: a save may be some steps away.
        left = options.steps - last_step(folder / "killed")
        most = 2 * left // (options.kills - sum(done.values()) + 1) - SAVE_EVERY
        steps = dice.randint(1, max(most, 1))
        hit = disturb(start(options, folder, "killed"), folder / "killed", whom, in_save, steps, dice, options.patience)
        if hit is None:
            break  # it was faster
        done[hit] += 1
        print(f"{sum(done.values())}: {hit}, after step {last_step(folder / 'killed')}", flush=True)
    finish = start(options, folder, "killed")
    code = finish.ended(options.patience)
    different = compare(folder / "whole", folder / "killed") if code == 0 else ["it did not end well"]
    verdict = "equal bit for bit" if not different else f"DIFFERENT: {', '.join(different[:3])}"
    kills = ", ".join(f"{count} x {hit}" for hit, count in sorted(done.items()))
    minutes = (time.monotonic() - began) / 60
    print(
        f"{sum(done.values())} kills ({kills}) of {options.steps} steps, {options.engine}, seed {options.seed}, ",
        end="",
    )
    print(f"{minutes:.0f} min: {verdict}")
    return int(bool(different) or sum(done.values()) < options.kills)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--engine", default="zero2")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--patience", type=float, default=600.0, help="seconds for one start")
    return parser.parse_args()


def start(options: argparse.Namespace, folder: Path, name: str) -> Launch:
    place = folder / f"{name}-launch"
    place.mkdir(exist_ok=True)
    case = train_case(folder, name=name, steps=options.steps, checkpoint__every=SAVE_EVERY, log_every=1)
    return Launch(accelerate, options.engine, [case], place)


def disturb(
    launch: Launch, run: Path, whom: str, in_save: bool, steps: int, dice: random.Random, patience: float
) -> str | None:
    """Kill, at a random moment after so many new steps. Returns what was done, None if the run had ended before."""
    workers: dict[int, int] = {}
    deadline = time.monotonic() + patience
    while sum(line.startswith("step ") for line in launch.text().splitlines()) < steps:
        assert time.monotonic() < deadline, launch.text()
        if not launch.process.is_alive():
            return None
        workers |= launch.workers()
        time.sleep(0.02)
    time.sleep(dice.uniform(0.0, 0.1))  # anywhere in a step
    moment = "between"
    while in_save and launch.process.is_alive() and time.monotonic() < deadline:
        if list((run / "checkpoints").glob(".step_*.tmp")):
            moment = "in a save"
            break
        time.sleep(0.001)
    if not launch.process.is_alive():
        return None
    strike(launch, workers, whom)
    launch.ended(60.0)
    while any(Path(f"/proc/{process}").exists() for process in workers.values()):
        assert time.monotonic() < deadline, "a process outlived its launch"
        time.sleep(0.05)
    return f"{whom} {moment}"


def strike(launch: Launch, workers: dict[int, int], whom: str) -> None:
    if whom == "all":
        os.killpg(launch.process.pid, signal.SIGKILL)
    else:
        process = launch.process.pid if whom == "launcher" else workers[int(whom[-1])]
        os.kill(process, signal.SIGKILL)


def last_step(run: Path) -> int:
    checkpoints = list_checkpoints(run / "checkpoints")
    return int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0


def compare(run: Path, other: Path) -> list[str]:
    """Differences between the last checkpoints of two runs."""
    tensors, others = final_tensors(run), final_tensors(other)
    different = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    states = [read_info(list_checkpoints(path / "checkpoints")[-1]) for path in (run, other)]
    if states[0].adam_steps != states[1].adam_steps or states[0].state.step != states[1].state.step:
        different.append("step counts")
    return different


if __name__ == "__main__":
    sys.exit(main())
