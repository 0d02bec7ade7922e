"""The only factory: config -> networks, roles, updates, data. What cannot be built is named by its config key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from anyflow_train.config.derived import latent_shape
from anyflow_train.config.objective import FlowMap as FlowMapConfig
from anyflow_train.config.on_policy import DistributionMatching
from anyflow_train.config.run import RunConfig
from anyflow_train.config.slots import branch_counts, micro_slots
from anyflow_train.data.fingerprint import known_fingerprint
from anyflow_train.data.loader import Loader
from anyflow_train.data.manifest import check_compatible
from anyflow_train.data.shards import ShardSet
from anyflow_train.flow.types import FlowMap
from anyflow_train.models.adapters import trainable_parameters
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.models.transformer import AnyFlowTransformer3DModel
from anyflow_train.objectives.distribution_matching import DistributionMatchingObjective, FakeScoreObjective
from anyflow_train.objectives.flow_map import FlowMapObjective
from anyflow_train.objectives.flow_matching import FlowMatchingObjective
from anyflow_train.objectives.rollouts import Endpoints, Rollouts
from anyflow_train.objectives.types import Roles
from anyflow_train.training.ema import AveragedFlowMap, Ema
from anyflow_train.training.engine import autocast_dtype, build_engine
from anyflow_train.training.entry import Entry
from anyflow_train.training.networks import start_fake_score, start_student, start_teacher
from anyflow_train.training.updates import Term, Trainable, Update
from anyflow_train.training.world import World


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
        groups = {kind: engine.entries(kind) for kind in ("weights", "exp_avg", "exp_avg_sq")}
        if trainable.ema is not None:
            groups["ema"] = {name: engine.entry(name, average) for name, average in trainable.ema.tensors()}
        return {prefix + kind: entries for kind, entries in groups.items()}


def build_recipe(config: RunConfig, world: World) -> Recipe:
    """Networks on the device, optimizer and averages at their start, and the list of updates.

    Raises:
        UserError: a network cannot be loaded, or is not what the config says.
    """
    network = _prepared(start_student(config.student, config.seed, world), config, world)
    teacher = _teacher_role(config, world)
    engine = build_engine(world, network, trainable_parameters(network), config.optimizer)
    ema = Ema(engine.shards(), config.optimizer.ema)
    live = NetworkFlowMap(engine.network, autocast_dtype(config.engine.precision))
    trainables = {"student": Trainable(network, engine, config.optimizer, ema)}
    roles = Roles(live, _derivative_role(config, engine.network, ema), teacher)
    updates = (_student_update(config, world),)
    if isinstance(config.on_policy, DistributionMatching):
        trainables["fake_score"] = fake = _fake_score(config, config.on_policy, world)
        score = NetworkFlowMap(fake.engine.network, autocast_dtype(config.engine.precision))
        roles = replace(roles, fake_score=score)
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
        micro_slots(engine.global_batch, engine.micro_batch, world.data_size, world.data_rank),
        data.text_lengths,
        workers=data.workers,
        start_step=start_step,
        max_bad_share=data.max_bad_share,
        shuffle_shards=data.shuffle_shards,
        device=world.device,
    )


def _derivative_role(config: RunConfig, network: AnyFlowTransformer3DModel, ema: Ema) -> FlowMap:
    """What the time derivative is taken of: the student or its average, in the precision of the derivative."""
    if not isinstance(config.objective, FlowMapConfig):
        return NetworkFlowMap(network, autocast_dtype(config.engine.precision))
    flow_map = NetworkFlowMap(network, autocast_dtype(config.objective.derivative_precision))
    return AveragedFlowMap(flow_map, ema) if config.objective.derivative_network == "ema" else flow_map


def _prepared(network: AnyFlowTransformer3DModel, config: RunConfig, world: World) -> AnyFlowTransformer3DModel:
    """A network that is trained, as the config has them computed."""
    network.split_sequence(world.sequence_group)
    if config.student.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if config.engine.compile:
        network.compile()
    return network


def _fake_score(config: RunConfig, on_policy: DistributionMatching, world: World) -> Trainable:
    """Fully trained, from the teacher's weights as a rule."""
    settings = on_policy.fake_score
    network = _prepared(start_fake_score(settings.init, world), config, world)
    optimizer = config.optimizer.model_copy(update={"lr": settings.lr})
    return Trainable(network, build_engine(world, network, trainable_parameters(network), optimizer), optimizer, None)


def _teacher_role(config: RunConfig, world: World) -> FlowMap | None:
    """The frozen teacher, where an objective asks for it."""
    follows = isinstance(config.objective, FlowMapConfig) and config.objective.velocity == "teacher"
    if not (follows or isinstance(config.on_policy, DistributionMatching)):
        return None
    return NetworkFlowMap(start_teacher(config.teacher.source, world), autocast_dtype(config.engine.precision))


def _on_policy_updates(config: RunConfig, on_policy: DistributionMatching, student: Update) -> tuple[Update, Update]:
    """The student's update with distribution matching before its own term, then the fake score's."""
    latent = latent_shape(config.data, config.student.architecture.in_channels)
    rollouts = Rollouts(latent, on_policy.steps, on_policy.shift, on_policy.first_jump)
    endpoints = Endpoints() if on_policy.fake_score.rollout == "student" else None
    matching = DistributionMatchingObjective(rollouts, on_policy.score_times, on_policy.guidance_scale, endpoints)
    beside = [replace(term, weight=on_policy.objective_weight) for term in student.terms if on_policy.objective_weight]
    terms = (Term("distribution_matching", matching, on_policy.weight, "none", 0), *beside)
    score = FakeScoreObjective(rollouts, on_policy.fake_score.times, endpoints)
    return (
        Update("student", terms, every=on_policy.fake_score.updates),
        Update("fake_score", (Term("flow_matching", score, 1.0, "none", 0),)),
    )


def _student_update(config: RunConfig, world: World) -> Update:
    objective, times = config.objective, config.times
    if not isinstance(objective, FlowMapConfig):
        term = Term("flow_matching", FlowMatchingObjective(objective, times), 1.0, "none", config.engine.global_batch)
        return Update("student", (term,))
    counts = branch_counts(config.engine.global_batch, times.diffusion_share, times.consistency_share)
    student = FlowMapObjective(objective, times, counts, world.data_size)
    return Update("student", (Term("flow_map", student, 1.0, objective.rebalance, counts.diffusion),))
