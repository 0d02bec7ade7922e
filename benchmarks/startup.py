"""Measure the time of a command from the start of its process: help, a check, and a tiny run until its first step.

For comparison, the imports of torch and diffusers, which every training needs, are measured alternately with the
commands. Wall-clock seconds depend on the load of the machine; CPU seconds (user and system, all threads) depend on it
less. Python keeps its compiled files, as it does for users, and the first round, which may write them, is not counted.
The tiny run has the experiment's network, teacher, VAE and validation; its shards contain random numbers.

    python benchmarks/startup.py --repeats 5 --json startup.json
    python benchmarks/startup.py --only help check --repeats 20
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from common import heading, in_turns, write_json
from random_shards import write_random_shards

from anyflow_train.config.compose import compose

ANYFLOW = ("-m", "anyflow_train")
TRAIN = (*ANYFLOW, "train", "experiment=tiny", "name=run", "log_every=1")
PROGRAMS = {
    "torch": ("-c", "import torch"),
    "diffusers": ("-c", "import torch, diffusers"),
    "help": (*ANYFLOW, "--help"),
    "check": (*ANYFLOW, "check", "experiment=tiny"),
}
TITLES = {
    "torch": "python: import torch",
    "diffusers": "python: import torch, diffusers",
    "help": "anyflow --help",
    "check": "anyflow check experiment=tiny",
    "train": "anyflow train experiment=tiny, first step",
}

CLIPS, SHARDS = 64, 2
Cost = dict[str, float]


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        programs: dict[str, Callable[[], Cost]] = {name: partial(whole, words) for name, words in PROGRAMS.items()}
        if "train" in options.only:
            shards = Path(folder) / "shards"
            write_random_shards(shards, compose("train", ["experiment=tiny"]), CLIPS, SHARDS)
            programs["train"] = partial(until_first_step, shards, Path(folder))
        chosen = {name: call for name, call in programs.items() if name in ("torch", *options.only)}
        found = {name: summary(costs) for name, costs in in_turns(chosen, options.repeats).items()}
    print(f"{heading('cpu', f'load {os.getloadavg()[0]:.1f}')}; {options.repeats} runs each, alternating")
    print(f"{'':42s}{'seconds':>16s}{'CPU seconds':>18s}{'ratio to':>11s}")
    print(f"{'':42s}{'best':>8s}{'median':>8s}{'best':>10s}{'median':>8s}{'torch':>11s}")
    for name, costs in found.items():
        costs["ratio"] = costs["processor_median"] / found["torch"]["processor_median"]
        print(row(name, costs))
    print("the ratio is between the medians of CPU seconds")
    write_json(options.json, "cpu", {"repeats": options.repeats, "programs": found})


def whole(words: tuple[str, ...]) -> Cost:
    """Measure a process from its start to its end."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], env=environment(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed")
    return {"wall": seconds, "processor": usage.ru_utime + usage.ru_stime}


def until_first_step(shards: Path, folder: Path) -> Cost:
    """Measure a new tiny run from its start to the log line of its first step, and end it there."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        words = [*TRAIN, f"out={out}", f"data.shards={shards}", f"evaluation.held_out={shards}"]
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *words], env=environment(), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("step 1/"):
                    return {"wall": time.perf_counter() - start, "processor": processor_seconds(process.pid)}
        finally:
            process.kill()
            process.communicate()
    raise SystemExit("the run ended before its first step")


def processor_seconds(process: int) -> float:
    """CPU seconds of a running process, all threads, user and system."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def environment() -> dict[str, str]:
    """Environment of this process, with which Python keeps its compiled files."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def summary(costs: list[Cost]) -> Cost:
    """Best and median of every clock."""
    clocks = {name: [cost[name] for cost in costs] for name in costs[0]}
    best = {f"{name}_best": min(values) for name, values in clocks.items()}
    return best | {f"{name}_median": median(values) for name, values in clocks.items()}


def row(name: str, costs: Cost) -> str:
    """Format a line of the table."""
    keys = ("wall_best", "wall_median", "processor_best", "processor_median")
    wall, wall_median, processor, processor_median = (costs[key] for key in keys)
    cells = f"{wall:8.2f}{wall_median:8.2f}{processor:10.2f}{processor_median:8.2f}{costs['ratio']:10.2f}x"
    return f"{TITLES[name]:42s}{cells}"


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = [name for name in TITLES if name != "torch"]
    parser.add_argument("--only", nargs="+", choices=others, default=others, help="in addition to torch")
    parser.add_argument("--repeats", type=int, default=5, help="measured runs of each program, after one warm-up")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
