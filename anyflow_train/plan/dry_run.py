"""A dry run: the real recipe and the real updates of a run, on fake tensors that hold no numbers.

Operations and memory are counted while the training code itself runs. So a user's own objective is planned as well as
the shipped ones. Networks are built with few blocks and with one more; all figures grow linearly with the blocks.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from statistics import fmean
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from anyflow_train.config.positions import local_positions
from anyflow_train.config.run import RunConfig
from anyflow_train.config.schedule import stages
from anyflow_train.data.batch import Batch
from anyflow_train.models.kernels import as_on_gpu
from anyflow_train.plan.meter import Meter, Moment, Work
from anyflow_train.plan.remembered import Repeats, chunk_by_chunk, everything, remembered
from anyflow_train.plan.stand_ins import DryDraw, fake_batch, fake_materials, stored_architecture
from anyflow_train.plan.states import Sizes, network_sizes
from anyflow_train.plan.validation import sample_once
from anyflow_train.training.processes.world import ALONE
from anyflow_train.training.recipe import Recipe, build_recipe
from anyflow_train.training.reporting.profile import watched
from anyflow_train.training.updates import Term, Update, make_update

# Draws of a step's shared numbers over which operations are averaged, where an objective asks for such numbers.
VARIANTS = 8
Figures = dict[tuple[str, Hashable], tuple[float, ...]]
"""Everything that a dry run counts, by kind and key: linear in the number of blocks of every network."""
Count = Callable[[Mapping[int, int]], Figures]
"""Gives the figures of shallow networks. The mapping is from a network's number of blocks to how many are built."""


@dataclass(frozen=True)
class DryRun:
    """Needs of a run, as a dry run found them.

    Attributes:
        operations: number of operations of a whole step of all processes together, mean over the draws.
        samples: number of samples in the calls of a flow map in such a step, by part of the step.
        moments: candidates for the fullest moment of one process, each with its part of the step.
        sizes: sizes of every role's network; `student` is the first.
        assumed: roles whose network is taken to be as large as the student's, because its config is not here.
        calls: operations of one call for one sample in validation, of the student and of a teacher as reference.
        costliest: number of the draw of shared numbers whose step costs most.
        stages: `work` of each stage of the run. All other fields describe the dearest stage; moments are of all stages.
    """

    operations: Mapping[Work, float]
    samples: Mapping[str, float]
    moments: Sequence[tuple[str, Moment]]
    sizes: Mapping[str, Sizes]
    assumed: tuple[str, ...]
    calls: Mapping[str, float]
    costliest: int
    stages: tuple[float, ...] = ()

    @property
    def work(self) -> float:
        """Operations of a step, without those that gradient checkpointing repeats."""
        return sum(count for work, count in self.operations.items() if not work.repeated)

    @property
    def by_precision(self) -> dict[str, float]:
        """Operations of a step in `half` precision and in `float32`, with those that are repeated."""
        flops = {"half": 0.0, "float32": 0.0}
        for work, count in self.operations.items():
            flops["float32" if work.dtype == torch.float32 else "half"] += count
        return flops


def from_two_blocks(config: RunConfig, figures: Count, fewest: int = 1) -> Figures:
    """Extrapolate the figures of whole networks from those of networks with `fewest` blocks and with one more.

    Where the networks of a run have different numbers of blocks, one more block is added to one number at a time.
    """
    counts = block_counts(config)
    shallow = {count: min(fewest, count) for count in counts}
    few = figures(shallow)
    found = dict(few)
    for count, blocks in shallow.items():
        more = figures({**shallow, count: blocks + 1})
        for key in more.keys() | few.keys():
            values = zip_longest(*(each.get(key, ()) for each in (found, few, more)), fillvalue=0)
            found[key] = tuple(total + (count - blocks) * (b - a) for total, a, b in values)
    return found


def dry_run(config: RunConfig, world: int) -> DryRun:
    """Count a step of a config that its rules accept, on `world` processes: one of the dearest stage."""

    def plan(first: int) -> DryRun:
        def operations(blocks: Mapping[int, int]) -> Figures:
            with _dry_step(config, blocks, first, everything) as step:
                return step.operations()

        found = from_two_blocks(config, operations)
        costs = {variant: cost for (kind, variant), (cost,) in found.items() if kind == "cost"}
        costliest: Any = max(costs, key=costs.__getitem__)
        # Memory is counted with a new recipe, in which no rollout waits for an update that was not made.
        return _unpacked(found | _memory(config, world, first, costliest), costliest)

    return _dearest([plan(stage.steps[0]) for stage in stages(config)])


def dry_run_memory(config: RunConfig, world: int, variant: int) -> DryRun:
    """Count only the memory of a step.

    Args:
        variant: the draw that costs most, as the dry run of almost the same config found it.
    """
    found = [_memory(config, world, stage.steps[0], variant) for stage in stages(config)]
    return _dearest([_unpacked(figures, variant) for figures in found])


def _memory(config: RunConfig, world: int, first: int, variant: int) -> Figures:
    def figures(blocks: Mapping[int, int]) -> Figures:
        with _dry_step(config, blocks, first, chunk_by_chunk) as step:
            return step.memory(variant, world)

    # With one block, the fullest moment may be another one than with many. And the last block of a causal network ends
    # early when it encodes context: only from two blocks on does one run whole.
    return from_two_blocks(config, figures, 2)


def _dearest(found: Sequence[DryRun]) -> DryRun:
    """Pick the stage with the most operations, and give it the moments of all stages."""
    dearest = max(found, key=lambda stage: sum(stage.operations.values()))
    moments = [moment for stage in found for moment in stage.moments]
    return replace(dearest, moments=moments, stages=tuple(stage.work for stage in found))


def block_counts(config: RunConfig) -> set[int]:
    """Collect the numbers of blocks that the run's networks have."""
    sources = [config.teacher.source]
    if config.on_policy.matching is not None:
        sources.append(config.on_policy.matching.fake_score.init)
    found = [stored_architecture(source) for source in sources]
    return {config.student.architecture.num_layers, *(other.num_layers for other in found if other is not None)}


@contextmanager
def _dry_step(config: RunConfig, blocks: Mapping[int, int], first: int, repeats: Repeats) -> Iterator[_DryStep]:
    """Build the stage that begins at step `first`, uncompiled, with `blocks[n]` blocks in a network that has n."""
    architecture = config.student.architecture
    shallow = architecture.model_copy(update={"num_layers": blocks[architecture.num_layers]})
    student = config.student.model_copy(update={"architecture": shallow})
    engine = config.engine.model_copy(update={"compile": False})
    config = config.model_copy(update={"student": student, "engine": engine, "objective": config.objective.planned})
    assumed: list[str] = []
    with FakeTensorMode(), Meter() as meter, as_on_gpu():
        recipe = build_recipe(config, ALONE, fake_materials(meter, blocks.__getitem__, shallow, assumed))
        recipe = replace(recipe, updates=tuple(update for update in recipe.updates if first in update.steps))
        figures: Figures = {("assumed", role): () for role in assumed}
        figures |= {("size", role): size for role, size in network_sizes(recipe).items()}
        meter.settle()
        yield _DryStep(config, watched(remembered(recipe, meter, repeats), meter), meter, figures)


@dataclass(frozen=True)
class _DryStep:
    """Steps of a recipe on fake data.

    Attributes:
        networks: figures of its networks.
    """

    config: RunConfig
    recipe: Recipe
    meter: Meter
    networks: Figures

    def operations(self) -> Figures:
        """Count operations and samples of a step, mean over the draws, and the cost of every variant of a whole step.

        The whole global batch is one micro-batch: its cost is the sum of those of its samples. Each term is made by
        itself, and counts with its probability. One that asks for no shared numbers costs the same in every draw.
        """
        total: Counter[Hashable] = Counter()
        positions = tuple(range(self.config.engine.global_batch))
        batch = fake_batch(self.config, positions, round(fmean(self.config.data.text_lengths)))
        draws = [self._draw(positions, variant, True) for variant in range(VARIANTS)]
        costs: list[float] = []
        for updates, share in _turns(self.recipe.updates):
            found: list[Counter[Hashable]] = []
            steady: dict[tuple[str, str], Counter[Hashable]] = {}
            for draw in draws:
                found.append(self._terms(updates, batch, draw, steady))
                if not draw.asked:
                    break
            for variant in found:
                for key, count in variant.items():
                    total[key] += share * count / len(found)  # pyright: ignore[reportArgumentType] (means)
            if len(updates) == len(self.recipe.updates):
                costs = [sum(count for key, count in variant.items() if isinstance(key, Work)) for variant in found]
        kinds = {key: "operations" if isinstance(key, Work) else "samples" for key in total}
        counts: Figures = {(kinds[key], key): (count,) for key, count in total.items()}
        return counts | {("cost", variant): (cost,) for variant, cost in enumerate(costs)}

    def memory(self, variant: int, world: int) -> Figures:
        """Find the fullest moments of a whole step, and of validation, on one of `world` processes.

        All terms of all updates are computed, for the first and last micro-batch of the process. The others wait on the
        device.
        """
        engine = self.config.engine
        accumulation = max(engine.global_batch * engine.sequence_parallel // (engine.micro_batch * world), 1)
        positions = local_positions(engine.global_batch, engine.micro_batch, 1, 0)
        make = partial(fake_batch, self.config, text_length=max(self.config.data.text_lengths))
        self.meter.restart()
        waiting = [make(positions[-1]) for _ in range(accumulation - 2)]
        batches = [make(each) for each in (positions[0], positions[-1])[-accumulation:]]
        draws = [self._draw(batch.positions, variant, False) for batch in batches]
        for update in self.recipe.updates:
            always = replace(update, terms=tuple(replace(term, probability=1.0) for term in update.terms))
            make_update(always, self.recipe.trainables[update.role], self.recipe.roles, batches, draws, 0.0, "")
        del waiting, batches
        called = sample_once(self.config, self.recipe, self.meter)
        calls: Figures = {("call", role): (count,) for role, count in called.items()}
        moments: Figures = {("moment", key): moment for key, moment in self.meter.moments.items()}
        return {**self.networks, **moments, **calls}

    def _terms(
        self,
        updates: Sequence[Update],
        batch: Batch,
        draw: DryDraw,
        steady: dict[tuple[str, str], Counter[Hashable]],
    ) -> Counter[Hashable]:
        """Count operations and samples of the updates.

        Args:
            steady: counts of the terms that do not depend on the draw, by role and term. New ones are added.
        """
        found: Counter[Hashable] = Counter()
        for update in updates:
            for term in update.terms:
                name, asked = (update.role, term.name), len(draw.asked)
                cost = steady.get(name) or self._term(update, replace(term, probability=1.0), batch, draw)
                if len(draw.asked) == asked:
                    steady[name] = cost
                for key, count in cost.items():
                    found[key] += term.probability * count  # pyright: ignore[reportArgumentType] (a mean)
        return found

    def _term(self, update: Update, term: Term, batch: Batch, draw: DryDraw) -> Counter[Hashable]:
        self.meter.restart()
        alone, trainable = replace(update, terms=(term,)), self.recipe.trainables[update.role]
        make_update(alone, trainable, self.recipe.roles, [batch], [draw], 0.0, "")
        return Counter({**self.meter.operations, **self.meter.samples})

    def _draw(self, positions: tuple[int, ...], variant: int, drop: bool) -> DryDraw:
        return DryDraw(0, variant, positions, torch.device("cpu"), "", variant, VARIANTS, drop)


def _turns(updates: Sequence[Update]) -> list[tuple[tuple[Update, ...], float]]:
    """List which updates are made together, and in what share of the steps."""
    period = math.lcm(*(update.every for update in updates))
    due = Counter(tuple(n for n, update in enumerate(updates) if step % update.every == 0) for step in range(period))
    return [(tuple(updates[n] for n in numbers), count / period) for numbers, count in due.items()]


def _unpacked(figures: Figures, costliest: int) -> DryRun:
    kinds: defaultdict[str, dict[Any, tuple[float, ...]]] = defaultdict(dict)
    for (kind, key), values in figures.items():
        kinds[kind][key] = values
    return DryRun(
        operations={work: count for work, (count,) in kinds["operations"].items()},
        samples={part: count for part, (count,) in kinds["samples"].items()},
        moments=[(part, Moment(*(max(round(v), 0) for v in held))) for (part, _), held in kinds["moment"].items()],
        sizes={role: Sizes(*map(round, size)) for role, size in kinds["size"].items()},
        assumed=tuple(kinds["assumed"]),
        calls={role: count for role, (count,) in kinds["call"].items()},
        costliest=costliest,
    )
