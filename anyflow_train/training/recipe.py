"""The only factory: config -> networks, roles, updates, data. What cannot be built is named by its config key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from anyflow_train.config.chunks import Chunks
from anyflow_train.config.derived import latent_shape
from anyflow_train.config.objective import FlowMap as FlowMapConfig
from anyflow_train.config.objective import FlowMatching, Objective
from anyflow_train.config.on_policy import DistributionMatching
from anyflow_train.config.positions import branch_counts, local_positions
from anyflow_train.config.run import RunConfig
from anyflow_train.data.fingerprint import known_fingerprint
from anyflow_train.data.loader import Loader
from anyflow_train.data.manifest import check_compatible
from anyflow_train.data.shards import ShardSet
from anyflow_train.flow.types import FlowMap
from anyflow_train.objectives.context import ChunksGiven, FirstFrameGiven, WholeClip
from anyflow_train.objectives.distribution_matching import DistributionMatchingObjective, FakeScoreObjective
from anyflow_train.objectives.flow_map import FlowMapObjective
from anyflow_train.objectives.flow_matching import FlowMatchingObjective
from anyflow_train.objectives.rollouts import RolloutBuffer, Rollouts
from anyflow_train.objectives.types import Roles
from anyflow_train.training.checkpoints.tensor_handle import Entry
from anyflow_train.training.ema import AveragedFlowMap, Ema
from anyflow_train.training.engine import autocast_dtype
from anyflow_train.training.materials import REAL, Materials
from anyflow_train.training.processes.world import World
from anyflow_train.training.roles import RoleNetwork, build_roles
from anyflow_train.training.updates import Term, Trainable, Update


@dataclass(frozen=True)
class Recipe:
    """All that a run trains with.

    Attributes:
        world: the processes.
        trainables: by role; every run has a `student`.
        roles: the flow maps that objectives see.
        averaged: the student under its averaged weights.
        updates: what a step does, in order.
    """

    world: World
    trainables: Mapping[str, Trainable]
    roles: Roles
    averaged: FlowMap
    updates: tuple[Update, ...]

    def groups(self, role: str) -> dict[str, dict[str, Entry]]:
        """A role's tensors as a checkpoint names them: the student's groups have no prefix."""
        trainable, prefix = self.trainables[role], "" if role == "student" else f"{role}."
        engine = trainable.engine
        groups = {kind: engine.entries(kind) for kind in engine.kinds}
        if trainable.ema is not None:
            groups["ema"] = {name: engine.entry(name, average) for name, average in trainable.ema.tensors()}
        return {prefix + kind: entries for kind, entries in groups.items()}


def build_recipe(config: RunConfig, world: World, materials: Materials = REAL) -> Recipe:
    """Networks on the device, optimizer and averages at their start, and the list of updates.

    Raises:
        UserError: a network cannot be loaded, or is not what the config says.
    """
    players = build_roles(config, world, materials)
    dtype = autocast_dtype(config.engine.precision)
    engine = materials.build_engine(world, players.student.network, players.student.parameters, config.optimizer)
    ema = Ema(engine.shards(), config.optimizer.ema)
    live = players.student.flow_map(engine.network, dtype)
    teacher = None if players.teacher is None else players.teacher(engine.network, dtype)
    roles = Roles(live, _derivative_role(config, players.student, engine.network, ema), teacher)
    trainables = {"student": Trainable(players.student.network, engine, config.optimizer, ema)}
    updates = (_student_update(config, world),)
    if isinstance(config.on_policy, DistributionMatching) and players.fake_score is not None:
        trainables["fake_score"] = fake = _fake_score(config, config.on_policy, players.fake_score, world, materials)
        roles = replace(roles, fake_score=players.fake_score.flow_map(fake.engine.network, dtype))
        updates = _on_policy_updates(config, config.on_policy, updates[0])
    return Recipe(world, trainables, roles, AveragedFlowMap(live, ema), updates)


def build_loader(config: RunConfig, world: World, start_step: int) -> Loader:
    """This process's batches from `start_step` on.

    Raises:
        UserError: the shards cannot be read, or were made for something else.
    """
    data, engine = config.data, config.engine
    shards = ShardSet.open(data.shards, data.cache, data.cache_gib)
    vae = known_fingerprint(config.teacher.codec_source, "vae")
    check_compatible(shards.manifest, data, config.student.architecture, vae)
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
    )


def _derivative_role(config: RunConfig, student: RoleNetwork, called: Any, ema: Ema) -> FlowMap:
    """What the time derivative is taken of: the student or its average, in the precision of the derivative."""
    if not isinstance(config.objective, FlowMapConfig):
        return student.flow_map(called, autocast_dtype(config.engine.precision))
    flow_map = student.flow_map(called, autocast_dtype(config.objective.derivative_precision))
    return AveragedFlowMap(flow_map, ema) if config.objective.derivative_network == "ema" else flow_map


def _fake_score(
    config: RunConfig, on_policy: DistributionMatching, player: RoleNetwork, world: World, materials: Materials
) -> Trainable:
    """Without averages: it is only a means."""
    optimizer = config.optimizer.model_copy(update={"lr": on_policy.fake_score.lr})
    engine = materials.build_engine(world, player.network, player.parameters, optimizer)
    return Trainable(player.network, engine, optimizer, None)


def _on_policy_updates(config: RunConfig, on_policy: DistributionMatching, student: Update) -> tuple[Update, Update]:
    """The student's update with distribution matching before its own term, then the fake score's."""
    latent = latent_shape(config.data, config.student.architecture.in_channels)
    chunks = Chunks.of(config.student.architecture)
    rollouts = Rollouts(latent, on_policy.steps, on_policy.shift, on_policy.first_jump, chunks)
    endpoints = RolloutBuffer() if on_policy.fake_score.rollout == "student" else None
    matching = DistributionMatchingObjective(rollouts, on_policy.score_times, on_policy.guidance_scale, endpoints)
    beside = [replace(term, weight=on_policy.objective_weight) for term in student.terms if on_policy.objective_weight]
    terms = (Term("distribution_matching", matching, on_policy.weight, "none", 0), *beside)
    score = FakeScoreObjective(rollouts, on_policy.fake_score.times, endpoints)
    return (
        Update("student", terms, every=on_policy.fake_score.updates),
        Update("fake_score", (Term("flow_matching", score, 1.0, "none", 0),)),
    )


def _student_update(config: RunConfig, world: World) -> Update:
    chunks, context = Chunks.of(config.student.architecture), config.context
    main = _main_term(config, world)
    if chunks is None:
        given = FirstFrameGiven(main.objective, context.i2v_probability)
        return Update("student", (replace(main, objective=given) if context.i2v_probability else main,))
    main = replace(main, objective=ChunksGiven(main.objective, chunks, context.long_share))
    if context.bidirectional_probability == 0:
        return Update("student", (main,))
    whole = WholeClip(FlowMatchingObjective(_at_one_time(config.objective), config.times))
    return Update("student", (main, Term("bidirectional", whole, 1.0, "none", 0, context.bidirectional_probability)))


def _at_one_time(objective: Objective) -> FlowMatching:
    """Flow matching with the text dropout and guidance of any objective."""
    if isinstance(objective, FlowMatching):
        return objective
    guidance = "none" if objective.guidance == "none" else "prediction"
    scale, dropout = objective.guidance_scale, objective.text_dropout
    return FlowMatching(kind="flow_matching", guidance=guidance, guidance_scale=scale, text_dropout=dropout)


def _main_term(config: RunConfig, world: World) -> Term:
    """The run's objective."""
    objective, times = config.objective, config.times
    if not isinstance(objective, FlowMapConfig):
        return Term("flow_matching", FlowMatchingObjective(objective, times), 1.0, "none", config.engine.global_batch)
    counts = branch_counts(config.engine.global_batch, times.diffusion_share, times.consistency_share)
    student = FlowMapObjective(objective, times, counts, world.data_size)
    balance = objective.rebalance, counts.diffusion
    return Term("flow_map", student, 1.0, *balance, smallest_mean=objective.rebalance_floor)
