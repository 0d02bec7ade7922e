"""The only factory: config -> networks, roles, updates, data. What cannot be built is named by its config key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from anyflow_train.config.objective import FlowMap as FlowMapConfig
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
from anyflow_train.objectives.flow_map import FlowMapObjective
from anyflow_train.objectives.flow_matching import FlowMatchingObjective
from anyflow_train.objectives.types import Roles
from anyflow_train.training.ema import AveragedFlowMap, Ema
from anyflow_train.training.engine import autocast_dtype, build_engine
from anyflow_train.training.entry import Entry
from anyflow_train.training.networks import start_student, start_teacher
from anyflow_train.training.updates import Term, Trainable, Update
from anyflow_train.training.world import World


@dataclass(frozen=True)
class Recipe:
    """All that a run trains with.

    Attributes:
        world: the processes.
        trainables: by role; every run has a `student`.
        roles: the flow maps that objectives see.
        updates: what a step does, in order.
    """

    world: World
    trainables: Mapping[str, Trainable]
    roles: Roles
    updates: tuple[Update, ...]

    def groups(self, role: str) -> dict[str, dict[str, Entry]]:
        """A role's tensors as a checkpoint names them: the student's groups have no prefix."""
        trainable, prefix = self.trainables[role], "" if role == "student" else f"{role}."
        engine = trainable.engine
        groups = {kind: engine.entries(kind) for kind in ("weights", "exp_avg", "exp_avg_sq")}
        groups["ema"] = {name: engine.entry(name, average) for name, average in trainable.ema.tensors()}
        return {prefix + kind: entries for kind, entries in groups.items()}


def build_recipe(config: RunConfig, world: World) -> Recipe:
    """Networks on the device, optimizer and averages at their start, and the list of updates.

    Raises:
        UserError: a network cannot be loaded, or is not what the config says.
    """
    network = start_student(config.student, config.seed, world)
    network.split_sequence(world.sequence_group)
    teacher = _teacher_role(config, world)
    if config.student.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if config.engine.compile:
        network.compile()
    engine = build_engine(world, network, trainable_parameters(network), config.optimizer)
    ema = Ema(engine.shards(), config.optimizer.ema)
    live = NetworkFlowMap(engine.network, autocast_dtype(config.engine.precision))
    student = Trainable(network, engine, ema, AveragedFlowMap(live, ema))
    roles = Roles(live, _derivative_role(config, engine.network, ema), teacher)
    return Recipe(world, {"student": student}, roles, (_student_update(config, world),))


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


def _teacher_role(config: RunConfig, world: World) -> FlowMap | None:
    """The frozen teacher, where the objective asks for it."""
    if not (isinstance(config.objective, FlowMapConfig) and config.objective.velocity == "teacher"):
        return None
    return NetworkFlowMap(start_teacher(config.teacher, world), autocast_dtype(config.engine.precision))


def _student_update(config: RunConfig, world: World) -> Update:
    objective, times = config.objective, config.times
    if not isinstance(objective, FlowMapConfig):
        term = Term("flow_matching", FlowMatchingObjective(objective, times), 1.0, "none", config.engine.global_batch)
        return Update("student", (term,))
    counts = branch_counts(config.engine.global_batch, times.diffusion_share, times.consistency_share)
    student = FlowMapObjective(objective, times, counts, world.data_size)
    return Update("student", (Term("flow_map", student, 1.0, objective.rebalance, counts.diffusion),))
