"""Build everything that a run trains with from its config: networks, roles, updates and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from anyflow_train.config.chunks import Chunks
from anyflow_train.config.derived import latent_shape
from anyflow_train.config.on_policy import DistributionMatching
from anyflow_train.config.own import objective_class
from anyflow_train.config.positions import local_positions
from anyflow_train.config.run import RunConfig
from anyflow_train.config.schedule import stages
from anyflow_train.data.fingerprint import known_fingerprint
from anyflow_train.data.loader import Loader
from anyflow_train.data.manifest import check_compatible, check_texts
from anyflow_train.data.mixture import open_training, size_prompts, split_by_size
from anyflow_train.devices import autocast_dtype
from anyflow_train.flow.types import FlowMap, FlowMapWithin
from anyflow_train.objectives.context import ChunksGiven, FirstFrameGiven, WholeClip
from anyflow_train.objectives.distribution_matching import DistributionMatchingObjective, FakeScoreObjective
from anyflow_train.objectives.flow_matching import FlowMatchingObjective
from anyflow_train.objectives.rollouts import RolloutBuffer, Rollouts
from anyflow_train.objectives.types import Roles, Setting
from anyflow_train.training.checkpoints.tensor_handle import Entry
from anyflow_train.training.ema import Ema
from anyflow_train.training.materials import REAL, Materials
from anyflow_train.training.processes.world import World
from anyflow_train.training.roles import RoleNetwork, build_roles
from anyflow_train.training.updates import Term, Trainable, Update


@dataclass(frozen=True)
class Recipe:
    """Everything that a run trains with, except the data.

    Attributes:
        world: the processes.
        trainables: trained roles by name; every run has a `student`.
        roles: flow maps that are passed to the objectives.
        averaged: flow map of the student with its averaged weights.
        updates: updates of a step, in order.
    """

    world: World
    trainables: Mapping[str, Trainable]
    roles: Roles
    averaged: FlowMap
    updates: tuple[Update, ...]

    def groups(self, role: str) -> dict[str, dict[str, Entry]]:
        """A role's tensors, by the checkpoint's group names. Only the student's groups have no prefix."""
        trainable, prefix = self.trainables[role], "" if role == "student" else f"{role}."
        engine = trainable.engine
        groups = {kind: engine.entries(kind) for kind in engine.kinds}
        if trainable.ema is not None:
            groups["ema"] = {name: engine.entry(name, average) for name, average in trainable.ema.tensors()}
        return {prefix + kind: entries for kind, entries in groups.items()}


def build_recipe(config: RunConfig, world: World, materials: Materials = REAL) -> Recipe:
    """Build the networks on the device, new optimizers and averages, and the list of updates.

    Raises:
        UserError: a network cannot be loaded, or differs from the config.
    """
    networks = build_roles(config, world, materials)
    student, fake_score = networks.student, networks.fake_score
    dtype = autocast_dtype(config.engine.precision)
    engine = materials.build_engine(world, student.network, student.parameters, config.optimizer)
    ema = Ema(engine.shards(), config.optimizer.ema)
    live = student.flow_map(engine.network, dtype)
    teacher = None if networks.teacher is None else networks.teacher(engine.network, dtype)
    roles = Roles(live, _derivative_role(config, student, engine.network, ema), teacher)
    trainables = {"student": Trainable(student.network, engine, config.optimizer, ema)}
    updates = tuple(
        Update("student", _student_terms(stage.config, world), steps=stage.steps) for stage in stages(config)
    )
    matching = config.on_policy.matching
    if matching is not None and fake_score is not None:
        trainables["fake_score"] = fake = _fake_score(config, matching, fake_score, world, materials)
        roles = replace(roles, fake_score=fake_score.flow_map(fake.engine.network, dtype))
        updates = _on_policy_updates(config, matching, updates)
    return Recipe(world, trainables, roles, FlowMapWithin(live, ema.applied), updates)


def build_loader(config: RunConfig, world: World, start_step: int) -> Loader:
    """Build the loader of this process's batches, from `start_step` on.

    Raises:
        UserError: the shards cannot be read, or do not fit the config.
    """
    data, engine = config.data, config.engine
    shards = open_training(data)
    clips = any(stage.config.objective.uses_clips for stage in stages(config))
    vae = known_fingerprint(config.teacher.codec_source, "vae") if clips else None
    for manifest in shards.manifests:
        if clips:
            check_compatible(manifest, data, config.student.architecture, vae)
        else:
            check_texts(manifest, data, config.student.architecture)
    if clips:
        several = len(data.sizes) > 1 or any(manifest.buckets for manifest in shards.manifests)
        buckets = split_by_size(shards, data.sizes) if several else ()
    else:
        channels = config.student.architecture.in_channels
        buckets = size_prompts(shards, [latent_shape(size, channels) for size in data.sizes])
    return Loader(
        shards,
        config.seed,
        engine.global_batch,
        local_positions(engine.global_batch, engine.micro_batch, world.data_size, world.data_rank),
        data.text_lengths,
        workers=data.workers,
        start_step=start_step,
        max_bad_share=data.max_bad_share,
        shuffle_shards=data.shuffle_shards,
        device=world.device,
        buckets=buckets,
    )


def _derivative_role(config: RunConfig, student: RoleNetwork, called: Any, ema: Ema) -> FlowMap:
    """Build the flow map whose time derivative is taken: the student or its average, in the derivative's precision."""
    derivative = config.objective.derivative_role
    if derivative is None:
        return student.flow_map(called, autocast_dtype(config.engine.precision))
    flow_map = student.flow_map(called, autocast_dtype(derivative.precision or config.engine.precision))
    return FlowMapWithin(flow_map, ema.applied) if derivative.network == "ema" else flow_map


def _fake_score(
    config: RunConfig, on_policy: DistributionMatching, role: RoleNetwork, world: World, materials: Materials
) -> Trainable:
    """Build the fake score. It has no averages, because nothing but training uses it."""
    optimizer = config.optimizer.model_copy(update={"lr": on_policy.fake_score.lr})
    engine = materials.build_engine(world, role.network, role.parameters, optimizer)
    return Trainable(role.network, engine, optimizer, None)


def _on_policy_updates(
    config: RunConfig, on_policy: DistributionMatching, student: tuple[Update, ...]
) -> tuple[Update, ...]:
    """Add distribution matching before the terms of the student's updates, and the update of the fake score."""
    chunks = Chunks.of(config.student.architecture)
    rollouts = Rollouts(on_policy.calls, on_policy.shift, on_policy.first_jump, chunks)
    endpoints = RolloutBuffer() if on_policy.fake_score.rollout == "student" else None
    matching = DistributionMatchingObjective(
        rollouts, on_policy.score_times, on_policy.guidance_scale, endpoints, on_policy.backward
    )
    weight, every = on_policy.objective_weight, on_policy.fake_score.updates
    main = Term(name="distribution_matching", objective=matching, weight=on_policy.weight)

    def terms(own: Update) -> tuple[Term, ...]:
        return (main, *(replace(term, weight=weight) for term in own.terms if weight))

    score = FakeScoreObjective(rollouts, on_policy.fake_score.times, endpoints)
    return (
        *(replace(own, terms=terms(own), every=every) for own in student),
        Update("fake_score", (Term(name="flow_matching", objective=score),)),
    )


def _student_terms(config: RunConfig, world: World) -> tuple[Term, ...]:
    chunks, context = Chunks.of(config.student.architecture), config.context
    main = _main_term(config, world)
    if chunks is None:
        given = FirstFrameGiven(main.objective, context.i2v_probability)
        return (replace(main, objective=given) if context.i2v_probability else main,)
    main = replace(main, objective=ChunksGiven(main.objective, chunks, context.long_share))
    if context.bidirectional_probability == 0:
        return (main,)
    whole = WholeClip(FlowMatchingObjective(config.objective.flow_matching(), config.times))
    share = context.bidirectional_probability
    return main, Term(name="bidirectional", objective=whole, probability=share)


def _main_term(config: RunConfig, world: World) -> Term:
    """Build the term of the run's objective."""
    objective, size = config.objective, config.engine.global_batch
    counts, balance = objective.branch_counts(config.times, size), objective.rebalancing
    setting = Setting(size, config.times, world.data_size)
    return Term(
        name=objective.kind.rpartition(":")[2],
        objective=objective_class(objective).build(objective, setting),
        rebalance=balance.mode,
        diffusion=0 if counts is None else counts.diffusion,
        smallest_mean=balance.floor,
    )
