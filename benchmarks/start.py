"""Measure the memory of a process while a trained network is loaded, whole on every process or directly in shards.

    python benchmarks/start.py --size 100m --engines zero2 zero3
    python benchmarks/start.py --size 1.3b --engines zero3 --processes 8        # on one GPU each

Random weights are written to the disk, and processes are started that load them as a run does. Under ZeRO-3 process 0
reads every weight once, and no process should hold more than its shard and one weight. The table counts memory that
only the process itself can free (RssAnon, sampled every millisecond), and on a GPU the memory that torch allocated.
Pages of the weights' file (RssFile) are listed separately: processes share them, and the system can drop them. A small
network is loaded first, so that libraries are not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from common import heading, write_json
from step import SIZES, build
from torch import nn

from anyflow_train.config.network import Student
from anyflow_train.config.run import Engine, Optimizer
from anyflow_train.models.adapters import trainable_parameters
from anyflow_train.training.ema import Ema
from anyflow_train.training.engine import build_engine
from anyflow_train.training.networks import start_student
from anyflow_train.training.processes.launched import exit_process
from anyflow_train.training.processes.world import World, start_world

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
SAMPLE_SECONDS = 0.001
# Every weight is allocated separately and returned to the system when it is freed. A heap would keep freed memory.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}


class Peak:
    """Memory of this process during a block, minus its memory before the block, in MiB.

    Attributes:
        most: largest value during the block.
        kept: value at the end of the block.
        pages: pages of files at the end of the block.
    """

    most = 0.0
    kept = 0.0
    pages = 0.0


def main() -> None:
    options = parse()
    if options.measure:
        exit_process(measure(options.measure))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"small": SIZES["tiny"], "large": SIZES[options.size]}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name, size in sizes.items():
            network = build(size)
            network.save_pretrained(Path(folder) / name, max_shard_size="200MB")
        weights = sum(parameter.nbytes for parameter in network.parameters()) / MIB
        largest = max(parameter.nbytes for parameter in network.parameters()) / MIB
        print(heading(device, f"{options.processes} processes"))
        print(f"{options.size}: weights {weights:.0f} MiB, the largest of them {largest:.1f} MiB")
        del network
        found: dict[str, list[dict[str, float]]] = {}
        for engine in options.engines:
            rows = launch(engine, Path(folder), options.processes)
            found[engine] = [{**row, "ratio": row["loading"] / weights} for row in rows]
            for row in found[engine]:
                print(line(engine, row), flush=True)
    facts = {"size": options.size, "processes": options.processes, "weights": weights, "largest": largest}
    write_json(options.json, device, {**facts, "engines": found})


def launch(engine: str, folder: Path, processes: int) -> list[dict[str, float]]:
    """Start the processes under a strategy of `launch/`. Returns the results of each process, by rank."""
    file = ROOT / "launch" / f"{engine}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command += ["--num_processes", str(processes), "--main_process_port", "0", __file__, "--measure", str(folder)]
    environment = {"OMP_NUM_THREADS": "1", **ALLOCATOR, **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{engine} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def measure(folder: Path) -> int:
    """Measure in one process of a launch."""
    world = start_world(Engine())
    load(folder / "small", world)
    with peak(world) as loading:
        network = load(folder / "large", world)
    with peak(world) as training:
        parameters = trainable_parameters(network)
        engine = build_engine(world, network, parameters, Optimizer())
        ema = Ema(engine.shards(), Optimizer().ema)
    del engine, ema, parameters  # held until here
    found = {
        "rank": world.rank,
        "loading": loading.most,
        "loaded": loading.kept,
        "pages": loading.pages,
        "start": max(loading.most, loading.kept + training.most),
        "ready": loading.kept + training.kept,
    }
    (folder / f"{world.rank}.json").write_text(json.dumps(found))
    return 0


def load(folder: Path, world: World) -> nn.Module:
    """Load a student as a run does."""
    config = json.loads((folder / "config.json").read_text())
    names = Student.model_fields["architecture"].annotation.model_fields  # pyright: ignore
    architecture = {name: config[name] for name in names if name in config}
    student = {"init": str(folder), "architecture": architecture, "gate_value": config["gate_value"]}
    return start_student(Student.model_validate(student), 0, world)


@contextmanager
def peak(world: World) -> Iterator[Peak]:
    """Measure the memory of this process while a block runs."""
    found, over = Peak(), threading.Event()
    held = _on_gpu if world.device.type == "cuda" else _in_memory
    _give_back()
    before, pages = held(), _resident("RssFile")
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            found.most = max(found.most, held() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
    if world.device.type == "cuda":
        found.most = torch.cuda.max_memory_allocated() / MIB - before
    _give_back()
    found.kept = held() - before
    found.most = max(found.most, found.kept)
    found.pages = _resident("RssFile") - pages


def line(engine: str, row: dict[str, float]) -> str:
    """Format the results of one process."""
    loading = f"loading {row['loading']:5.0f} MiB, {row['ratio']:.2f}x the weights"
    loaded = f"then {row['loaded']:5.0f} and {row['pages']:4.0f} of the file"
    start = f"with moments and averages {row['start']:5.0f}, then {row['ready']:5.0f}"
    return f"{engine:13} process {row['rank']:.0f}: {loading}, {loaded}; {start}"


def _in_memory() -> float:
    return _resident("RssAnon")


def _resident(kind: str) -> float:
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(f"{kind}:"):
            return int(text.split()[1]) / 1024
    raise SystemExit("this needs Linux")


def _on_gpu() -> float:
    return torch.cuda.memory_allocated() / MIB


def _give_back() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--engines", nargs="+", default=["zero2", "zero3"], help="files of launch/")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="folder for the weights; default: temporary")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers, in MiB, to this file")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
