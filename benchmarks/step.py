"""A whole stage-1 step of this package against the same step done the reference way, in one run.

Three sides take the same samples, times and noise:

* ours: the time derivative is taken only of the samples with r < t;
* reference way: of all samples, where it is then multiplied by zero for r = t; same network, so loss and gradient
  must be equal to float32 rounding, which is checked first;
* reference way with diffusers' network: the same weights in stock `AnyFlowTransformer3DModel`.

A step is the objective, backward, clipping, AdamW and EMA. Sides take turns; medians are compared.

    python benchmarks/step.py --size tiny --repeats 7 --json step.json
    python benchmarks/step.py --size 1.3b --device cuda
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import CLOCKS, heading, write_json
from diffusers.models.transformers.transformer_anyflow import AnyFlowTransformer3DModel as StockTransformer
from torch import Tensor, nn

from anyflow_train.config.objective import FlowMap as FlowMapConfig
from anyflow_train.config.objective import Times
from anyflow_train.config.run import Ema as EmaConfig
from anyflow_train.config.run import Optimizer
from anyflow_train.config.slots import branch_counts, micro_slots
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.types import Condition
from anyflow_train.models.flow_map import TIME_SCALE, NetworkFlowMap
from anyflow_train.models.wan import build_network
from anyflow_train.objectives.flow_map import FlowMapObjective
from anyflow_train.objectives.types import Roles
from anyflow_train.training.ema import Ema
from anyflow_train.training.engine import ReplicatedEngine
from anyflow_train.training.updates import Term, Trainable, Update, UpdateReport, make_update
from anyflow_train.training.world import World

FIRST_MOMENT = 0.9
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


SIZES = {
    "tiny": Size(4, 32, 384, 4, 64, 64, (5, 16, 8, 8), 16, 32, 32),  # the quick start's
    "100m": Size(12, 64, 3072, 12, 512, 256, (3, 16, 8, 8), 32, 4, 4),  # 113M parameters, 48 tokens
    "1.3b": Size(12, 128, 8960, 30, 4096, 256, (9, 16, 30, 52), 512, 4, 2, checkpointing=True),  # Wan2.1, 3510 tokens
}


@dataclass(frozen=True)
class StockFlowMap:
    """diffusers' network as a flow map: it wants times per frame."""

    network: StockTransformer
    dtype: torch.dtype | None

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        times = [(TIME_SCALE * time)[:, None].expand(-1, x.shape[1]) for time in (t, r)]
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None):
            return self.network(x, *times, condition.text, return_dict=False)[0].float()


@dataclass(frozen=True)
class Side:
    """One way to do the step.

    Attributes:
        trainable, ema, roles: the network with its optimizer, its averages, and as a flow map.
        everywhere: the context in which the derivative is taken of all samples, or an empty one.
    """

    trainable: Trainable
    ema: Ema
    roles: Roles
    everywhere: Any

    def step(self, update: Update, batches: Sequence[Batch], draws: Sequence[Draw]) -> UpdateReport:
        """One step. The learning rate is 0: weights stay, so that every repeat does the same."""
        with self.everywhere():
            report = make_update(update, self.trainable, self.roles, batches, draws, 0.0, "")
        self.ema.update(0)
        return report


@contextmanager
def derivative_everywhere() -> Iterator[None]:
    """The reference's way: difference forwards of all samples, r = t or not."""
    with patch("anyflow_train.objectives.flow_map.derivative_rows", lambda counts, slots, world: len(slots)):
        yield


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, size = torch.device(options.device), SIZES[options.size]
    dtype = torch.bfloat16 if options.precision == "bf16" else None
    network = build(size)
    stock = StockTransformer(**{k: v for k, v in network.config.items() if not k.startswith("_")})
    stock.load_state_dict(network.state_dict())
    for model in (network, stock):
        nn.Module.to(model, device)
        if size.checkpointing:
            model.enable_gradient_checkpointing()
    step = make_step(size, device)
    print(f"{options.size}: {sum(p.numel() for p in network.parameters()) / 1e6:.1f}M parameters, {asdict(size)}")
    print(heading(device, options.precision, f"{torch.get_num_threads()} threads"))

    ours = make_side(network, NetworkFlowMap(network, dtype), device, nullcontext)
    reference = replace(ours, everywhere=derivative_everywhere)
    equality = compare(ours, reference, step)
    print(f"ours and the reference way, same network: {equality}")
    sides = {"ours": ours, "reference way": reference}
    sides["reference way, diffusers' network"] = make_side(
        stock, StockFlowMap(stock, dtype), device, derivative_everywhere
    )
    seconds = measure(sides, step, CLOCKS[options.clock], options.repeats)
    base = seconds["ours"]
    for name, value in seconds.items():
        print(f"{name:36s} {value:8.3f} s/step   {value / base:5.2f}x of ours")
    facts = {name: getattr(options, name) for name in ("size", "precision", "clock", "repeats")}
    ratios = {name: value / base for name, value in seconds.items()}
    write_json(options.json, device, {**facts, "equality": equality, "seconds": seconds, "ratios": ratios})


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=None, help="fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of every side, after one that is not timed")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own choice")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="process: CPU seconds, for a busy machine")
    options = parser.parse_args()
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    return options


def build(size: Size):
    """Our network with random weights, float32, on the CPU."""
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
    # Undamped random networks are rough in time; what is compared here must not drown in that.
    return build_network(config, seed=0, time_frequency_limit=0.03)


def make_step(size: Size, device: torch.device) -> Step:
    """The update of stage 1 with the published shares, and a step's micro-batches of random samples."""
    times = Times()
    counts = branch_counts(size.batch, times.diffusion_share, times.consistency_share)
    objective = FlowMapObjective(FlowMapConfig(kind="flow_map"), times, counts)
    update = Update("student", (Term("flow_map", objective, 1.0, "weighted", counts.diffusion),))
    batches, draws = [], []
    for slots in micro_slots(size.batch, size.micro, 1, 0):
        draw = Draw(0, 0, slots, torch.device("cpu"))
        text, negative = draw.normal("text", (size.text, size.text_dim)), torch.zeros(1, size.text, size.text_dim)
        latents = draw.normal("data", size.latents)
        keys = tuple(str(slot) for slot in slots)
        batches.append(Batch(latents, Condition(text), Condition(negative), keys, slots).to(device))
        draws.append(Draw(0, 0, slots, device))
    return update, batches, draws


def make_side(network: nn.Module, flow_map: Any, device: torch.device, everywhere: Any) -> Side:
    """A network with an optimizer and averages of its own."""
    parameters = dict(network.named_parameters())
    ema = Ema(parameters, EmaConfig(decay=0.999, start_step=0))
    optimizer = Optimizer(betas=(FIRST_MOMENT, 0.95))
    engine = ReplicatedEngine(World(device), network, parameters, optimizer)
    return Side(Trainable(network, engine, optimizer, ema), ema, Roles(flow_map, flow_map), everywhere)


def compare(left: Side, right: Side, step: Step) -> dict[str, float]:
    """Relative differences of the loss and of the (clipped) gradient, which Adam's first moment holds after a step."""
    losses, gradients = [], []
    for side in (left, right):
        before = [entry.read().clone() for entry in side.trainable.engine.entries("exp_avg").values()]
        losses.append(side.step(*step).values["loss"])
        after = [entry.read() for entry in side.trainable.engine.entries("exp_avg").values()]
        gradients.append([new - FIRST_MOMENT * old for new, old in zip(after, before, strict=True)])
    distance = sum(float((a - b).double().square().sum()) for a, b in zip(*gradients, strict=True)) ** 0.5
    norm = sum(float(a.double().square().sum()) for a in gradients[0]) ** 0.5
    return {"loss": abs(losses[0] - losses[1]) / abs(losses[0]), "gradient": distance / norm}


def measure(sides: dict[str, Side], step: Step, clock: Callable[[], float], repeats: int) -> dict[str, float]:
    """Median seconds per step. Sides take turns, so that a slow minute of the machine strikes all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, side in sides.items():
            start = clock()
            side.step(*step)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
