"""Measure how fast samples are read from shards, compared with stock WebDataset and with the training step.

Shards of random numbers with the run's sizes are written to a temporary folder with the package's writer. Then these
alternate:

* ours, with several numbers of workers (threads; 0 reads on demand): checksums, check for finite values, texts padded
  and cast to float32, whole micro-batches, as for one process of the run. The first batches are those of a whole step;
* stock: one process that loops over `webdataset.WebDataset(...).decode()` and converts the bytes to tensors;
* stock, batched: the same loop, with micro-batches as in training.

The new shards are in the page cache, so the disk is not measured; `--cold` drops them from the cache before every
reading (Linux). Workers also read samples ahead that are not counted; their CPU seconds include these. The need of a
step is predicted as in `anyflow plan`, or computed from a measured `--step-seconds`. The processes of one machine share
its cores and disks: multiply the need by their number.

    python benchmarks/loader.py --repeats 3 --json loader.json
    python benchmarks/loader.py --experiment wan1_3b_on_policy --gpu a100-80 --step-seconds 200 --folder /scratch --cold
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import heading, in_turns, medians, write_json
from random_shards import write_random_shards
from safetensors.torch import load
from torch import Tensor
from webdataset.compat import WebDataset

from anyflow_train.config.commands import PlanOptions
from anyflow_train.config.compose import compose
from anyflow_train.config.positions import local_positions
from anyflow_train.config.run import RunConfig
from anyflow_train.data.loader import Loader, pad_text
from anyflow_train.data.mixture import ShardMixture
from anyflow_train.data.shards import ShardSet
from anyflow_train.plan.dry_run import dry_run
from anyflow_train.training.gpus import GPUS, step_seconds

SHARDS = 2
MIB = 1 << 20
# A side opens the shards and yields the number of samples of every batch.
Side = Callable[[], Iterable[int]]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    config = compose("train", [f"experiment={options.experiment}"], world=options.processes)
    need = needed(config, options)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = write_random_shards(Path(folder), config, options.samples, SHARDS)
        calls = {name: partial(measure, side, Path(folder), options) for name, side in sides(config, folder, options)}
        found = {name: medians(rows) for name, rows in in_turns(calls, options.repeats).items()}
    for figures in found.values():
        rate = figures["samples_per_second"]
        figures |= {"of_stock": rate / found["stock"]["samples_per_second"], "of_need": rate / need}
    cache = "shards dropped from the page cache" if options.cold else "page cache warm: the shards were just written"
    print(heading("cpu", f"{options.threads} torch threads", f"load {os.getloadavg()[0]:.1f}"))
    print(f"{options.experiment}: {options.samples} samples of {size / options.samples / MIB:.1f} MiB; {cache}")
    print(f"each of {options.processes} x {options.gpu} needs {need:.3g} samples/s, {origin(options)}")
    print_table(found)
    slowest = min(figures["of_need"] for name, figures in found.items() if name.startswith("ours"))
    print(f"the slowest setting of ours reads {times(slowest)} as fast as the step of one GPU needs")
    named = ("experiment", "samples", "repeats", "processes", "threads", "cold", "gpu", "step_seconds")
    facts = {name: getattr(options, name) for name in named}
    write_json(options.json, "cpu", {**facts, "bytes": size, "needed_samples_per_second": need, "sides": found})


def needed(config: RunConfig, options: argparse.Namespace) -> float:
    """Samples per second that one process of the run trains on."""
    seconds, world = options.step_seconds, options.processes
    if seconds is None:
        operations = dry_run(config, world).by_precision
        seconds = sum(step_seconds(operations, GPUS[options.gpu], world, options.utilisation).values())
    return config.engine.global_batch / (seconds * world)


def origin(options: argparse.Namespace) -> str:
    """Source of the step's time, for the printed line."""
    if options.step_seconds is not None:
        return f"at a step of {options.step_seconds:g} s, as given"
    return f"as planned at {options.utilisation:.0%} of its peak"


def sides(config: RunConfig, folder: str, options: argparse.Namespace) -> Iterator[tuple[str, Side]]:
    """Yield the compared sides with their names."""
    passes = 1 if options.cold else options.passes
    for workers in options.workers:
        name = f"ours, {workers} worker{'s' * (workers != 1)}"
        yield name, partial(our_batches, config, folder, passes, workers, options.processes)
    yield "stock", partial(stock_samples, folder, passes)
    yield "stock, batched", partial(stock_batches, config, folder, passes)


def measure(side: Side, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Read all samples, including opening the shards. The first batch is the first item of a side."""
    if options.cold:
        drop_from_page_cache(folder)
    start, processor = time.perf_counter(), time.process_time()
    moments, read = [], 0
    for count in side():
        moments.append(time.perf_counter() - start)
        read += count
    return {
        "first_batch_seconds": moments[0],
        "samples_per_second": read / moments[-1],
        "processor_seconds_per_sample": (time.process_time() - processor) / read,
    }


def our_batches(config: RunConfig, folder: str, passes: int, workers: int, processes: int) -> Iterator[int]:
    """Yield the number of samples of every step of one process's loader, for the given number of passes."""
    shards, engine = ShardMixture((ShardSet.open(folder),)), config.engine
    positions = local_positions(engine.global_batch, engine.micro_batch, processes, 0)
    with closing(Loader(shards, 0, engine.global_batch, positions, config.data.text_lengths, workers)) as loader:
        for batches in islice(loader, passes * len(shards) * processes // engine.global_batch):
            yield sum(len(batch.latents) for batch in batches)


def stock_samples(folder: str, passes: int) -> Iterator[int]:
    """Yield 1 for every sample, in the order of the shards."""
    return (1 for _ in stock_tensors(folder, passes))


def stock_batches(config: RunConfig, folder: str, passes: int) -> Iterator[int]:
    """Yield the sizes of micro-batches with texts padded to the longest length, made by a loop around WebDataset."""
    waiting: list[dict[str, Tensor]] = []
    for sample in stock_tensors(folder, passes):
        waiting.append(sample)
        if len(waiting) == config.engine.micro_batch:
            latents = torch.stack([one["latents"] for one in waiting])
            torch.stack([pad_text(one["text"], max(config.data.text_lengths)) for one in waiting])
            yield len(latents)
            waiting = []


def stock_tensors(folder: str, passes: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each sample. WebDataset decodes the caption, and returns safetensors as bytes."""
    shards = sorted(str(path) for path in Path(folder).glob("*.tar"))
    for _ in range(passes):
        samples: Any = WebDataset(shards, shardshuffle=False).decode()
        for sample in samples:
            yield load(sample["safetensors"])


def drop_from_page_cache(folder: Path) -> None:
    """Drop the files from the page cache, so that they are read from the disk next time."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def print_table(found: dict[str, dict[str, float]]) -> None:
    """Print a line for each side."""
    titles = f"{'of stock':>10s}{'of need':>11s}{'CPU ms/sample':>21s}{'first batch':>13s}"
    print(f"{'':18s}{'samples/s':>11s}{titles}")
    for name, figures in found.items():
        ratios = f"{times(figures['of_stock']):>10s}{times(figures['of_need']):>11s}"
        cost = f"{1000 * figures['processor_seconds_per_sample']:21.1f}{figures['first_batch_seconds']:11.3f} s"
        print(f"{name:18s}{figures['samples_per_second']:11.1f}{ratios}{cost}")


def times(ratio: float) -> str:
    """Format a ratio, with two decimals below 10."""
    return f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.2f}x"


def parse() -> argparse.Namespace:
    """Parse the command line."""
    plan = PlanOptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="wan1_3b_forward")
    parser.add_argument("--samples", type=int, default=32, help="samples to write and read; about 9 MiB each at 480p")
    parser.add_argument("--passes", type=int, default=4, help="passes over the samples per reading; 1 with --cold")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--threads", type=int, default=1, help="torch threads in every worker")
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds, after one warm-up")
    parser.add_argument("--cold", action="store_true", help="read from the disk")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder by default")
    parser.add_argument("--gpu", choices=GPUS, default=plan.gpu)
    parser.add_argument("--utilisation", type=float, default=plan.utilisation, help="predicted share of the GPU's peak")
    parser.add_argument("--processes", type=int, default=plan.gpus, help="processes of the run; one is measured")
    parser.add_argument("--step-seconds", type=float, default=None, help="measured time of a step")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
