"""The networks of a run, on their device: from files, from random weights, from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from anyflow_train.config.network import FullTraining, Lora, Student
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.models.adapters import add_lora, trainable_parameters
from anyflow_train.models.stored import StoredNetwork, open_network
from anyflow_train.models.transformer import AnyFlowTransformer3DModel
from anyflow_train.models.wan import build_network, load_network
from anyflow_train.training.checkpoint import read_info, resolve_checkpoint, restore_tensors
from anyflow_train.training.engine import build_sharded, shard_frozen, zero_stage
from anyflow_train.training.entry import Entry
from anyflow_train.training.world import World

Opened = TypeVar("Opened")


def start_student(config: Student, seed: int, world: World) -> AnyFlowTransformer3DModel:
    """The student on its device; under ZeRO-3 one that starts from trained weights is in shards from the first."""
    if config.init is None or zero_stage() < 3:
        return _moved(world.together(lambda: build_student(config, seed)), world)
    stored = world.together(lambda: _open_student(config, str(config.init)))
    network = build_sharded(lambda: AnyFlowTransformer3DModel(**stored.arguments), stored.read, world)
    if isinstance(config.adapter, Lora):
        add_lora(network, config.adapter, seed)
    return network


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


def start_teacher(source: str | None, world: World) -> AnyFlowTransformer3DModel:
    """The frozen teacher on its device, under ZeRO-3 in shards. At r = t it is the teacher, whatever its gate.

    Raises:
        UserError: `teacher.source` names none.
    """
    if source is None:
        raise UserError("teacher.source", "is null, but the run needs a teacher; name the teacher's folder")
    network = _start("teacher.source", source, world)
    network.split_sequence(world.sequence_group)
    network.requires_grad_(False)
    return network if zero_stage() < 3 else shard_frozen(network)


def start_fake_score(source: str, world: World) -> AnyFlowTransformer3DModel:
    """The fake score on its device, under ZeRO-3 in shards, all of it to be trained. It is only called at r = t.

    Raises:
        UserError: `on_policy.fake_score.init` names none.
    """
    return _start("on_policy.fake_score.init", source, world)


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


def _open_student(config: Student, source: str) -> StoredNetwork:
    try:
        stored = open_network(source, config.gate_value, config.deltatime_type)
    except UserError as error:
        raise _init_error(config, error) from error
    _check_architecture(stored.arguments, config.architecture.model_dump(), source)
    return stored


def _start(key: str, source: str, world: World) -> AnyFlowTransformer3DModel:
    """The whole network of a source, or its shards under ZeRO-3."""
    if zero_stage() < 3:
        return _moved(world.together(lambda: _opened(key, lambda: load_network(source))), world)
    stored = world.together(lambda: _opened(key, lambda: open_network(source)))
    return build_sharded(lambda: AnyFlowTransformer3DModel(**stored.arguments), stored.read, world)


def _opened(key: str, open_source: Callable[[], Opened]) -> Opened:
    try:
        return open_source()
    except UserError as error:
        raise UserError(key, str(error)) from error


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
