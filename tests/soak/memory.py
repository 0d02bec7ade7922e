"""Measure the resident memory of a run's two processes every 100 steps.

python tests/soak/memory.py [--engine ddp] [--steps 2000] [--folder FOLDER] [NAME=VALUE ...]

NAME=VALUE are environment variables of the processes, for example TORCH_FR_BUFFER_SIZE=0. The table has the memory of
each process in MiB. The last lines have its growth in kB per 100 steps in the first and in the second half of the run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.training.helpers import write_latents
from tests.training.launched import Launch, accelerate, train_case

EVERY = 100
WORLD = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="ddp")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("variables", nargs="*", metavar="NAME=VALUE")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="memory-"))
    folder.mkdir(parents=True, exist_ok=True)
    write_latents(folder / "shards")
    # One checkpoint at the end, whose copy in memory is not part of the growth.
    case = train_case(folder, steps=options.steps, log_every=EVERY, checkpoint__every=options.steps)
    variables = dict(word.split("=", 1) for word in options.variables)
    launch = Launch(partial(accelerate, processes=WORLD), options.engine, [case], folder, **variables)
    rows = measure(launch, options.steps)
    code = launch.ended()
    for rank in range(WORLD):
        used = [row[rank] for row in rows[1:]]  # the first steps allocate what all later ones use
        half = len(used) // 2
        for name, part in (("first", used[: half + 1]), ("second", used[half:])):
            growth = (part[-1] - part[0]) / 1000 / (len(part) - 1)
            print(f"process {rank}: {growth:.0f} kB per {EVERY} steps in the {name} half")
    sys.exit(code)


def measure(launch: Launch, steps: int) -> list[list[int]]:
    """Bytes of the resident memory of each process, after every `EVERY` steps but the last."""
    rows: list[list[int]] = []
    while (len(rows) + 1) * EVERY < steps:
        if not launch.process.is_alive():
            raise SystemExit(launch.text())
        if f"step {(len(rows) + 1) * EVERY}/" in launch.text():
            workers = launch.workers()
            rows.append([psutil.Process(workers[rank]).memory_info().rss for rank in range(WORLD)])
            shown = "  ".join(f"{used / 2**20:8.2f}" for used in rows[-1])
            print(f"step {len(rows) * EVERY:6}  {shown}", flush=True)
        time.sleep(0.02)
    return rows


if __name__ == "__main__":
    main()
