"""Measure the cost of a checkpoint for the training: written while the training waits, and in the background.

* waiting: tensors are streamed to the disk, and the next step begins when the checkpoint is complete;
* background: tensors are copied, and a thread writes the copy while the next steps run.

Stall is the time in which no step can run. Steps are slower while the thread writes, especially if they use all cores;
this time is measured separately. The cost of a save is the sum of both. The two ways alternate; medians are compared.
The folder determines which disk is measured.

    python benchmarks/checkpoint.py --size 100m --threads 1 --repeats 3 --json checkpoint.json
    python benchmarks/checkpoint.py --size 1.3b --device cuda --folder /scratch
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import heading, medians, write_json
from step import SIZES, Size, build
from torch import nn

from anyflow_train.config.run import Ema as EmaConfig
from anyflow_train.config.run import Optimizer, RunConfig
from anyflow_train.flow.types import Condition
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.training.checkpoints import saving
from anyflow_train.training.checkpoints.saving import Saver
from anyflow_train.training.checkpoints.state import TrainState
from anyflow_train.training.checkpoints.tensor_handle import Entry
from anyflow_train.training.ema import Ema
from anyflow_train.training.engine import ReplicatedEngine
from anyflow_train.training.processes.world import World

FREE_MEMORY = {"waiting": lambda: 0, "background": saving.free_memory}
CONFIG = {
    "name": "benchmark",
    "steps": 1,
    "student": {"architecture": {}},
    "objective": {"kind": "flow_matching"},
    "data": {"shards": "none", "frames": 1, "height": 16, "width": 16},
    "checkpoint": {"keep": 1},
}


@dataclass(frozen=True)
class Cost:
    """Cost of one save, in seconds.

    Attributes:
        stall: time until the next step may begin.
        durable: time until the checkpoint is complete on the disk.
        slower: additional time of the steps that ran during the save.
        total: sum of stall and slower.
    """

    stall: float
    durable: float
    slower: float
    total: float


class Training:
    """A network of a size, its optimizer and averages, and one sample to train on."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype | None) -> None:
        self.world = World(device)
        network = build(size)
        nn.Module.to(network, device)  # diffusers' `to` only adds checks for quantised networks
        if size.checkpointing:
            network.enable_gradient_checkpointing()
        parameters = dict(network.named_parameters())
        self._engine = ReplicatedEngine(self.world, network, parameters, Optimizer())
        self._ema = Ema(parameters, EmaConfig(decay=0.999, start_step=0))
        self._flow_map = NetworkFlowMap(network, dtype)
        self._latents = torch.randn(1, *size.latents, device=device)
        self._text = Condition(torch.randn(1, size.text, size.text_dim, device=device))

    def groups(self) -> dict[str, dict[str, Entry]]:
        """Entries of a checkpoint of a fully trained student, by group."""
        groups = {kind: self._engine.entries(kind) for kind in self._engine.kinds}
        return groups | {"ema": {name: Entry.of(tensor) for name, tensor in self._ema.tensors()}}

    def step(self) -> float:
        """Do one step of flow matching. Returns its seconds."""
        start = time.perf_counter()
        t = torch.full((1,), 0.5, device=self.world.device)
        loss = self._flow_map(self._latents, t, t, self._text).square().mean()
        self._engine.backward(loss)
        self._engine.step(1e-6, loss.detach().reshape(1))
        self._ema.update(0)
        _synchronise()
        return time.perf_counter() - start


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if options.device == "cuda" else None
    training = Training(SIZES[options.size], device, dtype)
    saved = 4 * sum(entry.shape.numel() for entries in training.groups().values() for entry in entries.values())
    print(f"{options.size}: {saved / 2**30:.2f} GiB in a checkpoint; {heading(device)}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        usual, costs = measure(training, Path(folder), options.repeats)
    print(f"a step takes {usual:.3f} s when nothing is written")
    print(f"{'':10s}{'stall':>10s}{'durable':>10s}{'slower steps':>14s}{'cost':>10s}")
    for name, cost in costs.items():
        print(f"{name:10s}{cost.stall:9.2f}s{cost.durable:9.2f}s{cost.slower:13.2f}s{cost.total:9.2f}s")
    ratios = {key: getattr(costs["waiting"], key) / getattr(costs["background"], key) for key in ("stall", "total")}
    print(f"in the background: stall {ratios['stall']:.1f}x shorter, cost {ratios['total']:.1f}x smaller")
    facts = {"size": options.size, "repeats": options.repeats, "bytes": saved, "step": usual}
    seconds = {name: asdict(cost) for name, cost in costs.items()}
    write_json(options.json, device, {**facts, "seconds": seconds, "ratios": ratios})


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="measured saves of each kind, after one warm-up")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 keeps torch's default")
    parser.add_argument("--folder", type=Path, default=None, help="folder to write to; default: temporary")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    return parser.parse_args()


def measure(training: Training, folder: Path, repeats: int) -> tuple[float, dict[str, Cost]]:
    """Measure median seconds of a step without a save, and the median costs of each kind of save."""
    found: dict[str, list[Cost]] = {name: [] for name in FREE_MEMORY}
    usual: list[float] = []
    training.step()
    with closing(Saver(RunConfig.model_validate(CONFIG), folder, training.world, lambda text: None)) as saver:
        for number in range(repeats + 1):
            for name, free in FREE_MEMORY.items():
                usual += [training.step() for _ in range(2)]
                step = number * len(FREE_MEMORY) + list(FREE_MEMORY).index(name)
                with patch.object(saving, "free_memory", free):
                    found[name].append(one_save(training, saver, step, statistics.median(usual)))
    costs = {name: Cost(**medians(asdict(cost) for cost in rows[1:])) for name, rows in found.items()}
    return statistics.median(usual), costs


def one_save(training: Training, saver: Saver, step: int, usual: float) -> Cost:
    """Save, and run steps until the checkpoint is complete."""
    whole: list[float] = []
    with patch.object(saving, "prune_checkpoints", _noting(saving.prune_checkpoints, whole)):
        start = time.perf_counter()
        saver.save(TrainState(step=step), {"student": 1}, training.groups())
        stall = time.perf_counter() - start
        slower = 0.0
        while not whole:
            slower += training.step() - usual
        saver.wait()
    return Cost(stall, whole[0] - start, slower, stall + slower)


def _noting(prune: Callable[..., Any], moments: list[float]) -> Callable[..., None]:
    """Wrap the last function of a save, so that the time of the complete checkpoint is recorded."""

    def wrapped(*arguments: Any) -> None:
        moments.append(time.perf_counter())
        prune(*arguments)

    return wrapped


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
