"""The only factory: config -> networks, roles, updates, data. What cannot be built is named by its config key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from anyflow_train.config.network import FullTraining, Lora, Student
from anyflow_train.config.objective import FlowMap as FlowMapConfig
from anyflow_train.config.run import RunConfig
from anyflow_train.config.slots import branch_counts, micro_slots
from anyflow_train.data.fingerprint import known_fingerprint
from anyflow_train.data.loader import Loader
from anyflow_train.data.manifest import check_compatible
from anyflow_train.data.shards import ShardSet
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.flow.types import FlowMap
from anyflow_train.models.adapters import add_lora, trainable_parameters
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.models.stored import StoredNetwork, open_network
from anyflow_train.models.transformer import AnyFlowTransformer3DModel
from anyflow_train.models.wan import build_network, load_network
from anyflow_train.objectives.flow_map import FlowMapObjective
from anyflow_train.objectives.flow_matching import FlowMatchingObjective
from anyflow_train.objectives.types import Roles
from anyflow_train.training.checkpoint import read_info, resolve_checkpoint, restore_tensors
from anyflow_train.training.ema import AveragedFlowMap, Ema
from anyflow_train.training.engine import (
    autocast_dtype,
    build_engine,
    build_sharded,
    shard_frozen,
    zero_stage,
)
from anyflow_train.training.entry import Entry
from anyflow_train.training.updates import Term, Trainable, Update
from anyflow_train.training.world import World

Opened = TypeVar("Opened")


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
    network = _start_student(config.student, config.seed, world)
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


def _start_student(config: Student, seed: int, world: World) -> AnyFlowTransformer3DModel:
    """The student on its device; under ZeRO-3 one that starts from trained weights is in shards from the first."""
    if config.init is None or zero_stage() < 3:
        return _moved(world.together(lambda: build_student(config, seed)), world)
    stored = world.together(lambda: _open_student(config, str(config.init)))
    network = build_sharded(lambda: AnyFlowTransformer3DModel(**stored.arguments), stored.read, world)
    if isinstance(config.adapter, Lora):
        add_lora(network, config.adapter, seed)
    return network


def _open_student(config: Student, source: str) -> StoredNetwork:
    try:
        stored = open_network(source, config.gate_value, config.deltatime_type)
    except UserError as error:
        raise _init_error(config, error) from error
    _check_architecture(stored.arguments, config.architecture.model_dump(), source)
    return stored


def build_student(config: Student, seed: int) -> AnyFlowTransformer3DModel:
    """The student on the CPU in float32, adapters attached.

    Raises:
        UserError: `student.init` cannot be loaded; UserErrors: it has another shape than `student.architecture`.
    """
    architecture = config.architecture.model_dump()
    times = {"gate_value": config.gate_value, "deltatime_type": config.deltatime_type}
    if config.init is None:
        network = build_network({**architecture, **times}, seed, config.time_frequency_limit)
    else:
        network = _load_student(config, config.init)
        _check_architecture(network.config, architecture, config.init)
    if isinstance(config.adapter, Lora):
        add_lora(network, config.adapter, seed)
    return network


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


def load_trained_network(checkpoint: str | Path, weights: str = "ema") -> tuple[AnyFlowTransformer3DModel, RunConfig]:
    """A trained student on the CPU in float32, adapters attached but not merged, and its run's config.

    Args:
        checkpoint: run directory (its best checkpoint, else its latest) or checkpoint folder.
        weights: `ema` or `raw`.

    Raises:
        UserError: there is no checkpoint, or it does not fit its own config.
    """
    path = resolve_checkpoint(checkpoint)
    config = RunConfig.model_validate(read_info(path).config)
    # A fully trained student is all in the checkpoint: what it started from need not be there any more.
    whole = isinstance(config.student.adapter, FullTraining)
    network = build_student(config.student.model_copy(update={"init": None}) if whole else config.student, config.seed)
    entries = {name: Entry.of(parameter) for name, parameter in trainable_parameters(network).items()}
    restore_tensors(path, "ema" if weights == "ema" else "weights", entries)
    return network.eval(), config


def _derivative_role(config: RunConfig, network: AnyFlowTransformer3DModel, ema: Ema) -> FlowMap:
    """What the time derivative is taken of: the student or its average, in the precision of the derivative."""
    if not isinstance(config.objective, FlowMapConfig):
        return NetworkFlowMap(network, autocast_dtype(config.engine.precision))
    flow_map = NetworkFlowMap(network, autocast_dtype(config.objective.derivative_precision))
    return AveragedFlowMap(flow_map, ema) if config.objective.derivative_network == "ema" else flow_map


def _teacher_role(config: RunConfig, world: World) -> FlowMap | None:
    """The frozen teacher where the objective asks for it. It is called at r = t, where any gate gives the teacher."""
    if not (isinstance(config.objective, FlowMapConfig) and config.objective.velocity == "teacher"):
        return None
    if zero_stage() < 3:
        network = _moved(world.together(lambda: _open_teacher(config, load_network)), world)
    else:
        stored = world.together(lambda: _open_teacher(config, open_network))
        network = build_sharded(lambda: AnyFlowTransformer3DModel(**stored.arguments), stored.read, world)
    network.split_sequence(world.sequence_group)
    network.requires_grad_(False)
    whole = network if zero_stage() < 3 else shard_frozen(network)
    return NetworkFlowMap(whole, autocast_dtype(config.engine.precision))


def _open_teacher(config: RunConfig, open_source: Callable[[str], Opened]) -> Opened:
    if config.teacher.source is None:
        raise UserError("teacher.source", "is null, but objective.velocity is 'teacher'; name the teacher's folder")
    try:
        return open_source(config.teacher.source)
    except UserError as error:
        raise UserError("teacher.source", str(error)) from error


def _student_update(config: RunConfig, world: World) -> Update:
    objective, times = config.objective, config.times
    if not isinstance(objective, FlowMapConfig):
        term = Term("flow_matching", FlowMatchingObjective(objective, times), 1.0, "none", config.engine.global_batch)
        return Update("student", (term,))
    counts = branch_counts(config.engine.global_batch, times.diffusion_share, times.consistency_share)
    student = FlowMapObjective(objective, times, counts, world.data_size)
    return Update("student", (Term("flow_map", student, 1.0, objective.rebalance, counts.diffusion),))


def _load_student(config: Student, source: str) -> AnyFlowTransformer3DModel:
    try:
        return load_network(source, config.gate_value, config.deltatime_type)
    except UserError as error:
        raise _init_error(config, error) from error


def _init_error(config: Student, error: UserError) -> UserError:
    times = f"student.gate_value={config.gate_value}, student.deltatime_type={config.deltatime_type}"
    return UserError("student.init", f"{error} (asked for: {times})")


def _moved(network: AnyFlowTransformer3DModel, world: World) -> AnyFlowTransformer3DModel:
    nn.Module.to(network, world.device)  # diffusers' own `to` only adds checks of quantised networks
    return network


def _check_architecture(actual: Mapping[str, Any], wanted: Mapping[str, Any], source: str) -> None:
    """Raises UserErrors: one line for every difference, with the config's value and the file's."""
    errors = []
    for name, value in wanted.items():
        found = actual[name]
        found = tuple(found) if isinstance(found, list) else found
        if found != value:
            problem = f"is {value!r}, but {source} was made with {found!r}"
            errors.append(UserError(f"student.architecture.{name}", problem))
    if errors:
        raise UserErrors(errors)
