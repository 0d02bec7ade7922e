"""What one step of a run computes: forwards and backwards of its global batch, part by part."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.derived import derive
from anyflow_train.config.objective import FlowMap
from anyflow_train.config.on_policy import DistributionMatching
from anyflow_train.config.positions import BranchCounts, branch_counts, local_positions, rows_with_second_term
from anyflow_train.config.run import RunConfig
from anyflow_train.plan.forwards import bidirectional_share, trained_on
from anyflow_train.plan.gpus import Gpu
from anyflow_train.plan.networks import the_student, the_teacher
from anyflow_train.plan.on_policy import on_policy_parts
from anyflow_train.plan.parts import Cost, Part, Precision

TERA = 1e12


def step_parts(config: RunConfig, world: int) -> list[Part]:
    """The parts of a step of a config that its rules accept, on `world` processes."""
    objective = [*_regression(config), *_targets(config, world), *_bidirectional(config)]
    if isinstance(config.on_policy, DistributionMatching):
        return on_policy_parts(config, config.on_policy, objective)
    return objective


def step_seconds(parts: list[Part], gpu: Gpu, world: int, utilisation: float) -> dict[Precision, float]:
    """Seconds of a step by the precision of its products, at a share `utilisation` of the peak of every one."""
    peaks: dict[Precision, float] = {"bf16": gpu.bf16, "fp16": gpu.bf16, "fp32": gpu.fp32}
    flops = {name: sum(part.flops for part in parts if part.precision == name) for name in peaks}
    return {name: flops[name] / (TERA * peak * utilisation * world) for name, peak in peaks.items()}


def utilisation(parts: list[Part], gpu: Gpu, world: int, seconds: float) -> float:
    """Model FLOPs utilisation of a step of so many seconds: operations that are work, over the peak in half precision.

    What is computed twice or multiplied by zero is no work.
    """
    work = sum(part.flops for part in parts if part.counts)
    return work / (TERA * gpu.bf16 * world * seconds)


def _regression(config: RunConfig) -> Iterator[Part]:
    """The student's forward and backward on its targets."""
    batch, main, student = config.engine.global_batch, config.engine.precision, _student(config)
    yield Part("student forward", batch, batch * student.forward, main)
    yield Part("backward", batch, batch * student.backward, main)
    if student.recomputed:
        again = batch * student.recomputed
        yield Part("recomputed by gradient checkpointing", batch, again, main, counts=False)


def _targets(config: RunConfig, world: int) -> Iterator[Part]:
    """The forwards without gradient that make what the student is regressed to."""
    objective, batch, main = config.objective, config.engine.global_batch, config.engine.precision
    student = _student(config).forward
    following = isinstance(objective, FlowMap) and objective.velocity == "teacher"
    teacher = the_teacher(config) if following else None
    if teacher is not None:
        yield Part("teacher's velocity", batch, batch * Cost.whole(config, teacher).forward, main)
    if objective.holds_guidance:
        guide = teacher if isinstance(objective, FlowMap) and objective.guidance == "target" else None
        cost = student if guide is None else Cost.whole(config, guide).forward
        yield from _guidance(config, f"guidance, by the {'student' if guide is None else 'teacher'}", cost)
    if not isinstance(objective, FlowMap):
        return
    counts = branch_counts(batch, config.times.diffusion_share, config.times.consistency_share)
    wanted = counts.consistency + counts.free
    done = _derivative_samples(counts, config, derive(config, world).shares)
    precision = objective.derivative_precision
    yield Part("two difference forwards, r < t", wanted, 2 * wanted * student, precision)
    if done > wanted:
        needless = done - wanted
        yield Part("two difference forwards, needless", needless, 2 * needless * student, precision, counts=False)


def _bidirectional(config: RunConfig) -> Iterator[Part]:
    """A causal student's flow matching on whole clips, with the text guidance of its objective."""
    share = bidirectional_share(config)
    if not share:
        return
    batch, main, cost = config.engine.global_batch, config.engine.precision, Cost.whole(config, the_student(config))
    yield Part("flow matching on whole clips", batch, batch * (cost.forward + cost.backward), main).in_share(share)
    if config.objective.holds_guidance:
        yield from (part.in_share(share) for part in _guidance(config, "whole clips, guidance", cost.forward))
    if cost.recomputed:
        again = Part("whole clips, recomputed", batch, batch * cost.recomputed, main, counts=False)
        yield again.in_share(share)


def _student(config: RunConfig) -> Cost:
    """Of what the objective asks the student for."""
    return Cost(config, the_student(config), trained_on(config))


def _guidance(config: RunConfig, name: str, cost: float) -> Iterator[Part]:
    """Forwards for the negative prompt: of the samples that have a text, and of one of a micro-batch where none has."""
    engine, dropped = config.engine, config.objective.flow_matching().text_dropout
    asked = engine.global_batch * (1 - dropped)
    yield Part(name, asked, asked * cost, engine.precision)
    needless = engine.global_batch * dropped**engine.micro_batch / engine.micro_batch
    if needless:
        yield Part(f"{name}, needless", needless, needless * cost, engine.precision, counts=False)


def _derivative_samples(counts: BranchCounts, config: RunConfig, shares: int) -> int:
    """For how many samples of the global batch the time derivative is taken."""
    micro_steps = local_positions(counts.global_batch, config.engine.micro_batch, shares, 0)
    return shares * sum(rows_with_second_term(counts, positions, shares) for positions in micro_steps)
