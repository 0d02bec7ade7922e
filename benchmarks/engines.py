"""Compare every strategy of the launcher with one process: losses, weights, and the overhead of the strategy.

    python benchmarks/engines.py --shards SHARDS [--experiment tiny] [--steps 20] [--engines ddp zero2]

Each strategy trains the experiment's global batch on 2 processes. Its losses and weights are compared with those of one
process on the same global batch. Its time per step is compared with one process on half of the global batch, because
each of the two processes has that much work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from common import heading, write_json
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
PROCESSES = 2


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        folder: its run directory.
        started: seconds from the launch until the first step began.
        seconds: per step, the median.
    """

    folder: Path
    started: float
    seconds: float

    def losses(self) -> torch.Tensor:
        """Loss of every step, (steps,) float64."""
        return torch.tensor([row["loss"] for row in self.rows()], dtype=torch.float64)

    def rows(self) -> list[dict[str, float]]:
        """Read the logged values of each step."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def tensors(self, group: str) -> dict[str, torch.Tensor]:
        """Read one group of tensors from the last checkpoint."""
        found = {}
        for path in sorted(self.folder.glob(f"checkpoints/step_*/{group}-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return found


@dataclass(frozen=True)
class Row:
    """Results of one strategy. `overhead` is a ratio of times; losses and weights are relative differences."""

    engine: str
    adapter: str
    start_up: float
    seconds: float
    overhead: float
    loss: float
    weights: float
    ema: float


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for adapter in arguments.adapters:
            whole = _train(arguments, "single", adapter, Path(folder) / f"{adapter}-whole", 1.0)
            half = _train(arguments, "single", adapter, Path(folder) / f"{adapter}-half", 1 / PROCESSES)
            for engine in arguments.engines:
                run = _train(arguments, engine, adapter, Path(folder) / f"{adapter}-{engine}", 1.0)
                rows.append(_compare(engine, adapter, run, whole, half))
                print(_line(rows[-1]), flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = f"experiment={arguments.experiment}"
    print(f"\n{heading(device, f'{PROCESSES} processes', run, f'{arguments.steps} steps')}")
    facts = {name: getattr(arguments, name) for name in ("experiment", "steps", "global_batch")}
    write_json(arguments.json, device, {**facts, "processes": PROCESSES, "rows": [asdict(row) for row in rows]})


def _train(arguments: argparse.Namespace, engine: str, adapter: str, folder: Path, share: float) -> Run:
    processes = 1 if engine == "single" else PROCESSES
    batch = round(arguments.global_batch * share)
    overrides = [
        f"experiment={arguments.experiment}",
        f"student/adapter={adapter}",
        f"out={folder}",
        "name=run",
        f"steps={arguments.steps}",
        "log_every=1",
        f"engine.global_batch={batch}",
        f"engine.micro_batch={batch // processes}",
        f"data.shards={arguments.shards}",
        f"checkpoint.every={arguments.steps}",
        "evaluation.every=0",
        "evaluation.held_out=null",
    ]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / f"{engine}.yaml")]
    launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
    command = [sys.executable, *launcher, "-m", "anyflow_train", "train", *overrides]
    begin = time.time()
    with (folder.parent / f"{folder.name}.log").open("w+") as log:
        if subprocess.run(
            command, stdout=log, stderr=log, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False
        ).returncode:
            log.seek(0)
            raise SystemExit(f"{engine} failed:\n{log.read()[-3000:]}")
    run = folder / "run"
    seconds = [json.loads(line)["seconds_per_step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    done = json.loads((run / "done.json").read_text())
    return Run(run, (run / "done.json").stat().st_mtime - begin - done["seconds"], median(seconds))


def _compare(engine: str, adapter: str, run: Run, whole: Run, half: Run) -> Row:
    loss = ((run.losses() - whole.losses()) / whole.losses()).abs().max().item()
    groups = [_difference(run.tensors(group), whole.tensors(group)) for group in ("weights", "ema")]
    return Row(engine, adapter, run.started, run.seconds, run.seconds / half.seconds, loss, *groups)


def _difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest relative difference over all tensors: the norm of the difference divided by the norm of the tensor."""
    assert ours.keys() == theirs.keys()
    return max(((tensor - theirs[name]).norm() / theirs[name].norm()).item() for name, tensor in ours.items())


def _line(row: Row) -> str:
    times = f"start {row.start_up:5.1f} s  step {row.seconds:.3f} s  {row.overhead:.2f}x one process on half the batch"
    return f"{row.engine:13} {row.adapter:5} {times}  loss {row.loss:.1e}  weights {row.weights:.1e}  ema {row.ema:.1e}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--experiment", default="tiny")
    parser.add_argument("--global-batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--adapters", nargs="+", default=["full", "lora"], choices=["full", "lora"])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
