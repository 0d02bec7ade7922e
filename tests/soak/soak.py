"""Kill a run repeatedly at random, and check that it ends like an undisturbed run.

python tests/soak/soak.py [--kills 20] [--steps 200] [--engine zero2] [--seed N] [--folder FOLDER]
python tests/soak/soak.py --kills 100 --steps 1000 --worlds 1 2 4 --engine ddp zero1 zero2 zero3

Every kill sends SIGKILL to one process, the launcher, or all of them, after a random number of new steps. Every second
kill is during a save. The last line has the result; the exit code is 0 if weights, averages and moments are equal bit
for bit.

With several values of `--worlds` or `--engine`, each start draws its number of processes, its engine and its
micro-batch. The undisturbed run then has one process. Sums are rounded in another order, which grows with the steps, so
a second undisturbed run with another micro-batch shows what rounding alone does: weights and averages may differ ten
times as much, in the norm of a tensor. 25 missing steps make a difference of 1e-1.
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
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from anyflow_train.training.checkpoints.reading import list_checkpoints, read_info
from tests.training.helpers import final_tensors, write_latents
from tests.training.launched import Launch, accelerate, train_case

SAVE_EVERY = 5
OF_ROUNDING = 10.0
GLOBAL_BATCH = 8


def main() -> int:
    options = arguments()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    write_latents(folder / "shards")
    dice, began = random.Random(options.seed), time.monotonic()
    mixed = len(options.worlds) > 1 or len(options.engine) > 1
    whole = (1, "single", 4) if mixed else (options.worlds[0], options.engine[0], 2)
    for name, setting in (("whole", whole), ("rounded", (1, "single", 2)))[: 1 + mixed]:
        undisturbed = start(options, folder, name, *setting)
        assert undisturbed.ended(options.patience) == 0, undisturbed.text()
    done: Counter[str] = Counter()
    starts = 0
    while sum(done.values()) < options.kills:
        starts += 1
        setting = draw(options, dice) if mixed else whole
        victims = [*(f"process {rank}" for rank in range(setting[0])), "all"]
        if setting[1] != "single":  # the process of a plain launch outlives its launcher
            victims.append("launcher")
        whom, in_save = dice.choice(victims), bool(starts % 2)
        # So that all kills together about fill the run, and none is left over: a save may be some steps away.
        left = options.steps - last_step(folder / "killed")
        most = 2 * left // (options.kills - sum(done.values()) + 1) - SAVE_EVERY
        steps = dice.randint(1, max(most, 1))
        launch = start(options, folder, "killed", *setting)
        hit = disturb(launch, folder / "killed", whom, in_save, steps, dice, options.patience)
        if hit is None:
            break  # it was faster
        done[hit] += 1
        ran = f"{setting[1]} on {setting[0]}, micro-batch {setting[2]}"
        print(f"{sum(done.values())}: {ran}: {hit}, after step {last_step(folder / 'killed')}", flush=True)
    finish = start(options, folder, "killed", *(draw(options, dice) if mixed else whole))
    code = finish.ended(options.patience)
    different, equal = ["it did not end well"], "equal bit for bit"
    if code == 0 and mixed:
        rounding, largest = (
            max(differences(folder / "whole", folder / name).values()) for name in ("rounded", "killed")
        )
        equal = f"largest difference {largest:.1e}, by rounding alone {rounding:.1e}"
        different = steps_differ(folder / "whole", folder / "killed")
        different += [equal] if not largest <= OF_ROUNDING * rounding else []
    elif code == 0:
        tensors, others = final_tensors(folder / "whole"), final_tensors(folder / "killed")
        different = steps_differ(folder / "whole", folder / "killed")
        different += [name for name in tensors if not torch.equal(tensors[name], others[name])]
    verdict = f"DIFFERENT: {', '.join(different[:3])}" if different else equal
    kills = ", ".join(f"{count} x {hit}" for hit, count in sorted(done.items()))
    minutes = (time.monotonic() - began) / 60
    print(
        f"{sum(done.values())} kills ({kills}) of {options.steps} steps, {' '.join(options.engine)}, "
        f"worlds {options.worlds}, seed {options.seed}, ",
        end="",
    )
    print(f"{minutes:.0f} min: {verdict}")
    return int(bool(different) or sum(done.values()) < options.kills)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--engine", nargs="+", default=["zero2"], help="files of launch/")
    parser.add_argument("--worlds", nargs="+", type=int, default=[2], help="numbers of processes: 1, 2, 4 or 8")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--patience", type=float, default=600.0, help="seconds for one start")
    return parser.parse_args()


def draw(options: argparse.Namespace, dice: random.Random) -> tuple[int, str, int]:
    """Draw a number of processes, an engine and a micro-batch. One process has no use for DDP."""
    world, engine = dice.choice(options.worlds), dice.choice(options.engine)
    micro_batch = dice.choice([size for size in (1, 2, 4, 8) if size * world <= GLOBAL_BATCH])
    return world, "single" if (world, engine) == (1, "ddp") else engine, micro_batch


def start(options: argparse.Namespace, folder: Path, name: str, world: int, engine: str, micro_batch: int) -> Launch:
    place = folder / f"{name}-launch"
    place.mkdir(exist_ok=True)
    changes = {"checkpoint__every": SAVE_EVERY, "log_every": 1, "engine__micro_batch": micro_batch}
    case = train_case(folder, name=name, steps=options.steps, engine__global_batch=GLOBAL_BATCH, **changes)
    return Launch(partial(accelerate, processes=world), engine, [case], place)


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


def differences(run: Path, other: Path) -> dict[str, float]:
    """Relative differences of weights and averages in the last checkpoints of two runs, in the norm of a tensor."""
    tensors, others = final_tensors(run), final_tensors(other)
    return {
        name: float((tensor - others[name]).norm() / tensor.norm())
        for name, tensor in tensors.items()
        if name.startswith(("weights", "ema"))
    }


def steps_differ(run: Path, other: Path) -> list[str]:
    """Return a complaint if the last checkpoints of two runs count other steps."""
    states = [read_info(list_checkpoints(path / "checkpoints")[-1]) for path in (run, other)]
    same = states[0].adam_steps == states[1].adam_steps and states[0].state.step == states[1].state.step
    return [] if same else ["step counts"]


if __name__ == "__main__":
    sys.exit(main())
