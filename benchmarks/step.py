"""Compare a whole stage-1 step of this package with the same step done the reference way, in one run.

Three sides use the same samples, times and noise:

* ours: the time derivative is computed only for the samples with r < t;
* reference way: the derivative is computed for all samples and multiplied by zero for r = t. The network is the same,
  so loss and gradient must be equal up to float32 rounding, which is checked first;
* reference way with diffusers' network: the same weights in stock `AnyFlowTransformer3DModel`.

A step is the objective, backward, clipping, AdamW and EMA. On a CPU the sides alternate; medians are compared.
Utilisation is the rate of the method's operations, divided by the rate of large matrix products on the same device in
the same run.

    python benchmarks/step.py --size tiny --repeats 7 --json step.json
    python benchmarks/step.py --size 1.3b-81 --device cuda --attention cudnn --compile
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import CLOCKS, heading, in_turns, medians, write_json
from diffusers.models.transformers.transformer_anyflow import AnyFlowTransformer3DModel as StockTransformer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from anyflow_train.bench.steps import StockFlowMap
from anyflow_train.config.network import Architecture
from anyflow_train.config.objective import Times
from anyflow_train.config.objectives import FlowMap as FlowMapConfig
from anyflow_train.config.positions import branch_counts, local_positions
from anyflow_train.config.run import Ema as EmaConfig
from anyflow_train.config.run import Optimizer
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.types import Condition
from anyflow_train.models.build import build_network
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.models.kernels import as_on_gpu
from anyflow_train.models.recompute import RECOMPUTE
from anyflow_train.models.transformer import AnyFlowTransformer3DModel
from anyflow_train.objectives.flow_map import FlowMapObjective
from anyflow_train.objectives.types import Roles
from anyflow_train.plan.meter import Meter
from anyflow_train.training.attention import KERNELS, attention_by
from anyflow_train.training.ema import Ema
from anyflow_train.training.engine import ReplicatedEngine
from anyflow_train.training.gpus import TERA
from anyflow_train.training.processes.world import World
from anyflow_train.training.updates import Term, Trainable, Update, UpdateReport, make_update

FIRST_MOMENT = 0.9
REFERENCE = "reference way, diffusers' network"
Step = tuple[Update, list[Batch], list[Draw]]


@dataclass(frozen=True)
class Size:
    """A network and the samples of a step: latents (F, C, H, W), text tokens, global batch and micro-batch."""

    heads: int
    head_dim: int
    ffn: int
    layers: int
    text_dim: int
    freq_dim: int
    latents: tuple[int, int, int, int]
    text: int
    batch: int
    micro: int
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens of a sample."""
        frames, _, height, width = self.latents
        return frames * (height // 2) * (width // 2)


SIZES = {
    "tiny": Size(4, 32, 384, 4, 64, 64, (5, 16, 8, 8), 16, 32, 32),  # the quick start's
    "100m": Size(12, 64, 3072, 12, 512, 256, (3, 16, 8, 8), 32, 4, 4),  # 113M parameters, 48 tokens
    # Wan2.1, 3510 tokens, and the 32,760 of 81 frames of 480x832
    "1.3b": Size(12, 128, 8960, 30, 4096, 256, (9, 16, 30, 52), 512, 4, 2, checkpointing=True),
    "1.3b-81": Size(12, 128, 8960, 30, 4096, 256, (21, 16, 60, 104), 512, 4, 1, checkpointing=True),
}


@dataclass(frozen=True)
class Side:
    """One way to do the step.

    Attributes:
        trainable: the network with its optimizer.
        ema: averages of the network.
        roles: the network as flow maps.
        everywhere: context in which the derivative is computed for all samples, or an empty one.
    """

    trainable: Trainable
    ema: Ema
    roles: Roles
    everywhere: Any

    def step(self, update: Update, batches: Sequence[Batch], draws: Sequence[Draw]) -> UpdateReport:
        """Do one step. The learning rate is 0, so that every repeat does the same work."""
        with self.everywhere():
            report = make_update(update, self.trainable, self.roles, batches, draws, 0.0, "")
        self.ema.update(0)
        return report


@contextmanager
def derivative_everywhere() -> Iterator[None]:
    """Compute the derivative for all samples, as the reference does, also for r = t."""
    with patch(
        "anyflow_train.objectives.flow_map.rows_with_second_term", lambda counts, positions, world: len(positions)
    ):
        yield


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, size = torch.device(options.device), SIZES[options.size]
    size = replace(size, batch=options.batch or size.batch, micro=options.micro or size.micro)
    dtype = torch.bfloat16 if options.precision == "bf16" else None
    step = make_step(size, device)
    print(f"{options.size}: {asdict(size)}, {size.tokens} tokens")
    print(heading(device, options.precision, f"{torch.get_num_threads()} threads"))
    rate = matmul_rate(device, dtype or torch.float32, CLOCKS[options.clock])
    print(f"measured matrix products: {rate / TERA:.2f} TFLOP/s")

    def own() -> dict[str, Side]:
        network = prepared(build(size), options, size, device)
        ours = make_side(network, NetworkFlowMap(network, dtype), device, nullcontext)
        return {"ours": ours, "reference way": replace(ours, everywhere=derivative_everywhere)}

    def diffusers_own() -> dict[str, Side]:
        stock = stock_network(build(size), size, device)
        return {REFERENCE: make_side(stock, StockFlowMap(stock, dtype), device, derivative_everywhere)}

    # On a GPU one network after the other: its clock is steady and its memory is limited.
    groups = [own, diffusers_own] if device.type == "cuda" else [lambda: own() | diffusers_own()]
    figures: dict[str, dict[str, float]] = {}
    equality: dict[str, float] = {}
    with attention_by(options.attention):
        for make in groups:
            sides = make()
            if "ours" in sides:
                equality = compare(sides["ours"], sides["reference way"], step)
                print(f"ours and the reference way, same network: {equality}")
            figures |= measure(sides, step, CLOCKS[options.clock], options.repeats)
            sides.clear()
    base = figures["ours"]["seconds"]
    for name, each in figures.items():
        each["ratio"] = each["seconds"] / base
        each["utilisation"] = work(size) / each["seconds"] / rate
        peak = f"   {each['peak_gib']:5.1f} GiB" if device.type == "cuda" else ""
        used = f"{each['utilisation']:4.0%} of the matrix products' rate"
        print(f"{name:36s} {each['seconds']:8.3f} s/step   {each['ratio']:5.2f}x of ours   {used}{peak}")
    kept = ("size", "precision", "clock", "repeats", "attention", "compile", "checkpointing")
    facts = {name: getattr(options, name) for name in kept}
    record = {**facts, "batch": size.batch, "micro": size.micro, "tokens": size.tokens, "matmul_tflops": rate / TERA}
    write_json(options.json, device, {**record, "equality": equality, "sides": figures})


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=None, help="fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--batch", type=int, default=0, help="global batch; 0 uses the size's default")
    parser.add_argument("--micro", type=int, default=0, help="micro-batch; 0 uses the size's default")
    parser.add_argument(
        "--checkpointing", choices=("none", *RECOMPUTE), default=None, help="for our network; diffusers' uses block"
    )
    parser.add_argument("--attention", choices=("sdpa", *KERNELS), default="sdpa", help="kernel of both networks")
    parser.add_argument("--compile", action="store_true", help="compile our blocks; takes a minute or more")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of every side, after one warm-up")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 keeps torch's default")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="process: CPU seconds, for a shared machine")
    options = parser.parse_args()
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    if options.checkpointing is None:
        options.checkpointing = "selective" if SIZES[options.size].checkpointing else "none"
    return options


def build(size: Size) -> Any:
    """Build our network with random weights, float32, on the CPU."""
    config = {
        "num_attention_heads": size.heads,
        "attention_head_dim": size.head_dim,
        "in_channels": size.latents[1],
        "out_channels": size.latents[1],
        "text_dim": size.text_dim,
        "freq_dim": size.freq_dim,
        "ffn_dim": size.ffn,
        "num_layers": size.layers,
    }
    # Random networks vary strongly over time, which would hide the compared differences. The limit makes them smooth.
    return build_network(config, seed=0, time_frequency_limit=0.03)


def prepared(network: AnyFlowTransformer3DModel, options: argparse.Namespace, size: Size, device: torch.device):
    """Set up our network as a run does: device, compilation, gradient checkpointing."""
    nn.Module.to(network, device)
    recompute = RECOMPUTE.get(options.checkpointing)
    if options.compile:
        network.compile_repeated_blocks(fullgraph=True)
        recompute = recompute and torch.compile(recompute, fullgraph=True)
    if recompute is not None:
        network.enable_gradient_checkpointing(recompute)
    return network


def stock_network(network: AnyFlowTransformer3DModel, size: Size, device: torch.device) -> StockTransformer:
    """Build diffusers' network with the same weights."""
    config: dict[str, Any] = dict(network.config)
    stock = StockTransformer(**{name: value for name, value in config.items() if not name.startswith("_")})
    stock.load_state_dict(network.state_dict())
    nn.Module.to(stock, device)
    if size.checkpointing:
        stock.enable_gradient_checkpointing()
    return stock


def matmul_rate(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Operations per second of a large matrix product."""
    side, repeats = (8192, 20) if device.type == "cuda" else (1024, 10)
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    best = float("inf")
    for _ in range(3):
        start = clock()
        for _ in range(repeats):
            product = left @ right
        float(product[0, 0])  # waits
        best = min(best, clock() - start)
    return 2 * side**3 * repeats / best


def work(size: Size) -> float:
    """Operations that the method requires in a step, without recomputation and without products with zero."""
    shape = Architecture(
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        text_dim=size.text_dim,
        freq_dim=size.freq_dim,
        ffn_dim=size.ffn,
        num_layers=size.layers,
    )
    with FakeTensorMode(), Meter() as meter, as_on_gpu():
        flow_map = NetworkFlowMap(build_network(shape.arguments(), 0), None)
        x, time, text = torch.empty(1, *size.latents), torch.empty(1), torch.empty(1, size.text, size.text_dim)
        with meter.part("forward"):
            velocity = flow_map(x, time, time, Condition(text))
        with meter.part("backward"):
            velocity.sum().backward()
    forward, backward = (
        sum(count for kind, count in meter.operations.items() if kind.part == part) for part in ("forward", "backward")
    )
    times = Times()
    counts = branch_counts(size.batch, times.diffusion_share, times.consistency_share)
    return size.batch * (forward + backward) + 2 * (size.batch - counts.diffusion) * forward


def make_step(size: Size, device: torch.device) -> Step:
    """Build the update of stage 1 with the published shares, and the micro-batches of a step with random samples."""
    times = Times()
    counts = branch_counts(size.batch, times.diffusion_share, times.consistency_share)
    objective = FlowMapObjective(FlowMapConfig(kind="flow_map"), times, counts)
    update = Update(
        "student", (Term(name="flow_map", objective=objective, rebalance="weighted", diffusion=counts.diffusion),)
    )
    batches, draws = [], []
    for positions in local_positions(size.batch, size.micro, 1, 0):
        draw = Draw(0, 0, positions, torch.device("cpu"))
        text, negative = draw.normal("text", (size.text, size.text_dim)), torch.zeros(1, size.text, size.text_dim)
        latents = draw.normal("data", size.latents)
        keys = tuple(str(position) for position in positions)
        batches.append(Batch(latents, Condition(text), Condition(negative), keys, positions).to(device))
        draws.append(Draw(0, 0, positions, device))
    return update, batches, draws


def make_side(network: nn.Module, flow_map: Any, device: torch.device, everywhere: Any) -> Side:
    """Build a side: a network with its optimizer and averages."""
    parameters = dict(network.named_parameters())
    ema = Ema(parameters, EmaConfig(decay=0.999, start_step=0))
    optimizer = Optimizer(betas=(FIRST_MOMENT, 0.95))
    engine = ReplicatedEngine(World(device), network, parameters, optimizer)
    return Side(Trainable(network, engine, optimizer, ema), ema, Roles(flow_map, flow_map), everywhere)


def compare(left: Side, right: Side, step: Step) -> dict[str, float]:
    """Relative differences of the loss and of the clipped gradient, which is computed from Adam's first moment."""
    losses, gradients = [], []
    for side in (left, right):
        before = [entry.read().clone() for entry in side.trainable.engine.entries("exp_avg").values()]
        losses.append(side.step(*step).values["loss"])
        after = [entry.read() for entry in side.trainable.engine.entries("exp_avg").values()]
        gradients.append([new - FIRST_MOMENT * old for new, old in zip(after, before, strict=True)])
    distance = sum(float((a - b).double().square().sum()) for a, b in zip(*gradients, strict=True)) ** 0.5
    norm = sum(float(a.double().square().sum()) for a in gradients[0]) ** 0.5
    return {"loss": abs(losses[0] - losses[1]) / abs(losses[0]), "gradient": distance / norm}


def measure(
    sides: dict[str, Side], step: Step, clock: Callable[[], float], repeats: int
) -> dict[str, dict[str, float]]:
    """Measure median seconds per step, and a GPU's peak memory. The sides alternate."""

    def one(side: Side) -> dict[str, float]:
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        start = clock()
        side.step(*step)
        if gpu:
            torch.cuda.synchronize()
        return {"seconds": clock() - start, "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0}

    rows = in_turns({name: partial(one, side) for name, side in sides.items()}, repeats)
    return {name: medians(each) for name, each in rows.items()}


if __name__ == "__main__":
    main()
