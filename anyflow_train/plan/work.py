"""What one step of a run computes: forwards and backwards of its global batch, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from anyflow_train.config.derived import derive
from anyflow_train.config.network import FullTraining
from anyflow_train.config.objective import FlowMap
from anyflow_train.config.run import RunConfig
from anyflow_train.config.slots import BranchCounts, derivative_rows, micro_slots
from anyflow_train.plan.gpus import Gpu
from anyflow_train.plan.products import Products, forward_products

Precision = Literal["bf16", "fp32"]
TERA = 1e12


@dataclass(frozen=True)
class Part:
    """A part of a step.

    Attributes:
        name: for people.
        samples: of the global batch that it is done for.
        flops: operations of all of them together.
        precision: of its matrix products.
        counts: whether it is work of the method, and no recomputation or forward whose result is multiplied by zero.
    """

    name: str
    samples: int
    flops: float
    precision: Precision
    counts: bool = True


def step_parts(config: RunConfig, world: int) -> list[Part]:
    """The parts of a step of a config that its rules accept, on `world` processes."""
    batch, main = config.engine.global_batch, config.engine.precision
    forward = _mean(config, lambda products: products.forward)
    parts = [
        Part("student forward", batch, batch * forward, main),
        Part("backward", batch, batch * _mean(config, lambda products: products.backward), main),
    ]
    if config.student.gradient_checkpointing:
        again = _mean(config, lambda products: products.recomputed)
        parts.append(Part("recomputed by gradient checkpointing", batch, batch * again, main, counts=False))
    return [*parts, *_targets(config, world, forward)]


def step_seconds(parts: list[Part], gpu: Gpu, world: int, utilisation: float) -> dict[Precision, float]:
    """Seconds of a step by the precision of its products, at a share `utilisation` of the peak of every one."""
    peaks: dict[Precision, float] = {"bf16": gpu.bf16, "fp32": gpu.fp32}
    flops = {name: sum(part.flops for part in parts if part.precision == name) for name in peaks}
    return {name: flops[name] / (TERA * peak * utilisation * world) for name, peak in peaks.items()}


def _targets(config: RunConfig, world: int, forward: float) -> Iterator[Part]:
    """The forwards without gradient that make what the student is regressed to."""
    objective, batch, main = config.objective, config.engine.global_batch, config.engine.precision
    teacher = isinstance(objective, FlowMap) and objective.velocity == "teacher"
    bare = _mean(config, lambda products: products.forward, frozen=True)
    if teacher:
        yield Part("teacher's velocity", batch, batch * bare, main)
    if objective.guidance != "none":
        by_teacher = teacher and objective.guidance == "target"
        name = f"guidance, by the {'teacher' if by_teacher else 'student'}"
        yield Part(name, batch, batch * (bare if by_teacher else forward), main)
    if not isinstance(objective, FlowMap):
        return
    derived = derive(config, world)
    assert derived.branches is not None
    wanted = derived.branches.consistency + derived.branches.free
    done = _derivative_samples(derived.branches, config, derived.shares)
    precision = objective.derivative_precision
    yield Part("two difference forwards, r < t", wanted, 2 * wanted * forward, precision)
    if done > wanted:
        needless = done - wanted
        yield Part("two difference forwards, needless", needless, 2 * needless * forward, precision, counts=False)


def _derivative_samples(counts: BranchCounts, config: RunConfig, shares: int) -> int:
    """For how many samples of the global batch the time derivative is taken."""
    micro_steps = micro_slots(counts.global_batch, config.engine.micro_batch, shares, 0)
    return shares * sum(derivative_rows(counts, slots, shares) for slots in micro_steps)


def _mean(config: RunConfig, quantity: Callable[[Products], int], frozen: bool = False) -> float:
    """Per sample, over the text lengths that are drawn; of the bare network where it is frozen."""
    adapter = FullTraining() if frozen else config.student.adapter
    tokens = derive(config, config.engine.sequence_parallel).tokens
    lengths = config.data.text_lengths
    by_length = {
        length: quantity(forward_products(config.student.architecture, adapter, tokens, length))
        for length in set(lengths)
    }
    return fmean(by_length[length] for length in lengths)
