"""Compare our transformer with diffusers': time of forward and forward + backward, and peak memory.

Both have the same weights and inputs. They alternate in one run, and the medians of their times are compared. Memory is
measured separately, each network in a new process: on a CPU the largest growth of the resident set during one forward +
backward, after one at a much smaller size that loads libraries and creates gradients; on a GPU the allocator's peak
without weights and gradients.

    python benchmarks/transformer.py                              # three sizes on the CPU, 1 thread and all of them
    python benchmarks/transformer.py --size quickstart --threads 1 --json result.json
    python benchmarks/transformer.py --clock cpu --threads 1      # on a shared machine
    python benchmarks/transformer.py --device cuda --size 1.3b --dtype bf16   # both recompute blocks: fits 80 GB
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from common import heading, write_json
from diffusers.models.transformers.transformer_anyflow import AnyFlowTransformer3DModel as StockTransformer
from torch import Tensor

from anyflow_train.models.transformer import AnyFlowTransformer3DModel

NETWORKS = {"ours": AnyFlowTransformer3DModel, "diffusers": StockTransformer}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RUNS = 7


@dataclass(frozen=True)
class Size:
    """A network and a batch: latents (batch, frames, 16, height, width), text of `text_length` tokens.

    With checkpointing, the backward pass of both networks recomputes their blocks.
    """

    batch: int
    frames: int
    height: int
    width: int
    text_length: int
    network: dict[str, int]
    checkpointing: bool = False


_QUICKSTART = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 4,
    "ffn_dim": 384,
    "text_dim": 64,
    "freq_dim": 64,
}
_WIDE = {"num_attention_heads": 8, "attention_head_dim": 64, "num_layers": 4, "ffn_dim": 2048, "text_dim": 512}
_1_3B = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960}
SIZES = {
    "quickstart": Size(32, 5, 8, 8, 16, _QUICKSTART),
    "9x12x16": Size(1, 9, 24, 32, 64, _WIDE),
    "21x15x26": Size(1, 21, 30, 52, 64, _WIDE),
    "1.3b": Size(1, 21, 60, 104, 512, _1_3B, checkpointing=True),  # fits 80 GB only so
}
CPU_SIZES = ("quickstart", "9x12x16", "21x15x26")


@dataclass(frozen=True)
class Result:
    """Median seconds and peak bytes for one size and one number of threads."""

    size: str
    threads: int
    forward: dict[str, float]
    both: dict[str, float]
    memory: dict[str, int]

    @property
    def ratios(self) -> dict[str, float]:
        """Ratios of speed and memory, ours divided by diffusers'."""
        return {
            "forward": self.forward["diffusers"] / self.forward["ours"],
            "forward+backward": self.both["diffusers"] / self.both["ours"],
            "memory": self.memory["ours"] / self.memory["diffusers"],
        }


def main() -> None:
    options = _options()
    if options.memory_of is not None:
        print(peak_memory(options.memory_of, SIZES[options.size[0]], options.device, DTYPES[options.dtype]))
        return
    print(heading(options.device, f"diffusers {diffusers.__version__}", options.dtype, "ours first"))
    print(f"{'size':12} {'threads':>7} | {'forward':^34} | {'forward + backward':^34} | peak memory")
    results = []
    for name in options.size:
        memory = {kind: _memory_in_a_process(kind, name, options) for kind in NETWORKS}
        for threads in options.threads:
            torch.set_num_threads(threads)
            forward, both = compare(SIZES[name], options)
            results.append(Result(name, threads, forward, both, memory))
            print(_row(results[-1]), flush=True)
    rows = [asdict(result) | {"ratios": result.ratios} for result in results]
    write_json(options.json, options.device, {"dtype": options.dtype, "clock": options.clock, "results": rows})


def compare(size: Size, options: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Measure median seconds of forward and of forward + backward, by network. The networks alternate."""
    device, dtype = options.device, DTYPES[options.dtype]
    networks = {kind: build(kind, size, device, dtype) for kind in NETWORKS}
    networks["ours"].load_state_dict(networks["diffusers"].state_dict())
    inputs = draw(size, device, dtype)
    clock = CLOCKS[options.clock]
    forward: dict[str, list[float]] = {kind: [] for kind in NETWORKS}
    both: dict[str, list[float]] = {kind: [] for kind in NETWORKS}
    for run in range(options.runs + 1):
        for kind, network in networks.items():
            for call, seconds in ((forward_only, forward[kind]), (forward_and_backward, both[kind])):
                network.zero_grad()
                elapsed = _timed(call, network, inputs, clock)
                seconds.extend([elapsed] if run else [])  # the first run warms up
    return _medians(forward), _medians(both)


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {kind: statistics.median(values) for kind, values in times.items()}


def build(kind: str, size: Size, device: str, dtype: torch.dtype) -> Any:
    """Build a network with random weights, which are the same in every call."""
    torch.manual_seed(0)
    network = NETWORKS[kind](**size.network).to(device)
    if size.checkpointing:
        network.enable_gradient_checkpointing()
    return network if dtype == torch.float32 else network.to(dtype)


def draw(size: Size, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw the arguments of a call. Times are per sample and frame, the only shape that diffusers supports."""
    torch.manual_seed(1)
    t = torch.rand(size.batch, 1).expand(-1, size.frames) * 1000
    text_dim = size.network.get("text_dim", 4096)
    return {
        "hidden_states": torch.randn(size.batch, size.frames, 16, size.height, size.width).to(device, dtype),
        "timestep": t.to(device),
        "r_timestep": (t / 2).to(device),
        "encoder_hidden_states": torch.randn(size.batch, size.text_length, text_dim).to(device, dtype),
    }


def forward_only(network: Any, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        network(**inputs)


def forward_and_backward(network: Any, inputs: dict[str, Tensor]) -> None:
    network(**inputs).sample.float().square().mean().backward()


def peak_memory(kind: str, size: Size, device: str, dtype: torch.dtype) -> int:
    """Peak bytes of one forward + backward, in addition to weights and gradients. Call it in a new process."""
    network = build(kind, size, device, dtype)
    forward_and_backward(
        network, draw(replace(size, batch=1, frames=1, height=4, width=4, text_length=4), device, dtype)
    )
    inputs = draw(size, device, dtype)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward_and_backward(network, inputs)
        return torch.cuda.max_memory_allocated() - before
    return _peak_resident(lambda: forward_and_backward(network, inputs))


def _peak_resident(call: Callable[[], None]) -> int:
    """Growth of the resident set during a call, in bytes, read every millisecond by another thread."""
    page = resource.getpagesize()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    before, highest, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return highest - before


def _memory_in_a_process(kind: str, size: str, options: argparse.Namespace) -> int:
    """Measure in a new process, so that memory that another network has freed is not reused uncounted."""
    command = [sys.executable, __file__, "--memory-of", kind, "--size", size]
    command += ["--device", options.device, "--dtype", options.dtype]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _timed(
    call: Callable[[Any, dict[str, Tensor]], None], network: Any, inputs: dict[str, Tensor], clock: Callable[[], float]
) -> float:
    synchronize = torch.cuda.synchronize if inputs["timestep"].is_cuda else lambda: None
    synchronize()
    start = clock()
    call(network, inputs)
    synchronize()
    return clock() - start


def _row(result: Result) -> str:
    cells = [f"{result.size:12} {result.threads:7d}"]
    for name, times in (("forward", result.forward), ("forward+backward", result.both)):
        cells.append(f"{times['ours']:10.4f} s {times['diffusers']:10.4f} s {result.ratios[name]:7.2f}x")
    ours, stock = (result.memory[kind] / 2**20 for kind in ("ours", "diffusers"))
    return " | ".join([*cells, f"{ours:.0f} of {stock:.0f} MiB ({result.ratios['memory']:.2f}x)"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(CPU_SIZES))
    parser.add_argument("--threads", nargs="+", type=int, default=None, help="numbers of CPU threads, one row for each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: CPU time, for one thread")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--json", type=Path, default=None, help="file for the results")
    parser.add_argument("--memory-of", choices=NETWORKS, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads is None:
        options.threads = [1] if options.device == "cuda" else sorted({1, os.cpu_count() or 1})
    return options


if __name__ == "__main__":
    main()
