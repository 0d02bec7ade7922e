"""Build the networks of a run on their device: from files, from random weights, or from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from anyflow_train.config.network import Architecture, FullTraining, Lora, Student
from anyflow_train.errors import UserError, raise_all
from anyflow_train.models.adapters import add_lora, trainable_parameters
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.build import Read, assemble, build_empty, build_network, fill, network_class
from anyflow_train.models.devices import on_device
from anyflow_train.models.frozen import store_in_bfloat16
from anyflow_train.models.shared_base import SharedBase
from anyflow_train.training.differences import other_interface
from anyflow_train.training.engine import build_sharded, shard_frozen
from anyflow_train.training.materials import REAL, Materials
from anyflow_train.training.processes.world import ALONE, World
from anyflow_train.training.weight_source import (
    TrainedWeights,
    open_source,
)

Prepare = Callable[[Any], Any]
"""Changes the layers of an empty network, before its weights are read."""


def start_student(
    config: Student, seed: int, world: World = ALONE, materials: Materials = REAL, frozen: torch.dtype = torch.float32
) -> Backbone:
    """Build the student on its device, with its adapters. Under ZeRO-3 `init` is read into shards.

    Args:
        frozen: dtype of the linear layers under its adapters. Random weights and everything that is trained are
            float32.

    Raises:
        UserError: `student.init` cannot be loaded. UserErrors: its shape or times differ from the student's.
    """
    if config.init is not None:
        with world.together():
            start = materials.open_student(config)
        whole = config.adapter.full_modules if isinstance(config.adapter, Lora) else None
        network = _on_device(start.arguments, start.read_trained, world, materials, _storing(frozen, whole))
        with world.together():
            return _adapted(network, config.adapter, seed, start.adapter)
    with world.together():
        network = build_network(config.arguments(), seed, config.time_frequency_limit)
        return on_device(_adapted(network, config.adapter, seed, None), world.device)


def start_shared(
    config: Student, seed: int, world: World, materials: Materials = REAL, frozen: torch.dtype = torch.float32
) -> SharedBase:
    """Build the student as the role `student` on a base that other roles can share. Arguments as in `start_student`.

    Raises:
        UserError: the student has no adapters, or `student.init` cannot be loaded.
    """
    if config.init is None or not isinstance(config.adapter, Lora):
        problem = "trains the whole network, so other roles cannot share it; choose student/adapter=lora"
        raise UserError("student.adapter", problem)
    with world.together():
        start = materials.open_student(config)
    network = _on_device(start.arguments, start.read, world, materials, _storing(frozen, ()))
    # Modules that a role trains whole start from the weights of the source, which the base may not hold.
    shared = SharedBase(network, start.read)
    shared.add("student", config.adapter, seed, "student.adapter")
    if start.adapter is not None:
        _copy_trained(start.adapter, shared.parameters("student"))
    return shared


def share_frozen(
    shared: SharedBase, role: str, source: str | None, student: Student, key: str, materials: Materials = REAL
) -> str | None:
    """Find a frozen source on the student's base. Returns None for the base itself, else `role`, which is then added.

    Args:
        source: network of the student's base, or a run that trained an adapter on it.
        student: config of the student.
        key: config key that names the source.

    Raises:
        UserError: the source has another base, or the student's second time changes what the base computes at r = t.
    """
    if student.deltatime_type != "r" and student.gate_value != 0:
        problem = f"is {student.deltatime_type!r}, which changes the network of {key} also at r = t; set it to r"
        raise UserError("student.deltatime_type", f"{problem}, or load one network per role")
    base, wanted = materials.open_student(student), materials.open_role(key, str(source))
    paths = [[part.path for part in start.parts] for start in (base, wanted)]
    if wanted.source == base.source and paths[0] == paths[1]:
        return None
    last = wanted.parts[-1] if wanted.parts else None
    if last is None or last.network.adapter is None or wanted.source != base.source or paths[0] != paths[1][:-1]:
        problem = f"{source} is neither {base.source}, the base of the student's adapter, nor an adapter on it"
        raise UserError(key, f"{problem}; load one network per role")
    if last.network.times["gate_value"] != student.gate_value and any("time_embedder" in name for name in last.tensors):
        raise UserError(key, f"{source} trained its time embedder with another gate_value; load one network per role")
    shared.add(role, last.network.adapter, 0, key)
    _copy_trained(last, shared.parameters(role))
    shared.freeze(role)
    return role


def start_teacher(
    source: str | None,
    student: Architecture,
    world: World,
    materials: Materials = REAL,
    frozen: torch.dtype = torch.float32,
) -> Backbone:
    """Build the frozen teacher like `start_role`. It is only called at r = t, so its gate is unused."""
    assert source is not None  # a rule of the config
    network = start_role("teacher.source", source, student, world, materials, _storing(frozen, ()))
    network.split_sequence(world.sequence_group)
    network.requires_grad_(False)
    return network if materials.zero_stage() < 3 else shard_frozen(network)


def start_role(
    key: str,
    source: str,
    student: Architecture,
    world: World,
    materials: Materials = REAL,
    prepare: Prepare = lambda network: network,
) -> Backbone:
    """Build the network of a role other than the student on its device, in shards under ZeRO-3.

    Raises:
        UserError: the source of `key` cannot be loaded. UserErrors: its latents or texts differ from the student's.
    """
    with world.together():
        start = materials.open_role(key, source)
        if "chunk_partition" in start.arguments:
            raise UserError(key, f"{source} is a causal student; choose a network that generates whole clips")
        raise_all(other_interface(key, source, start.arguments, student))
    return _on_device(start.arguments, start.read, world, materials, prepare)


def load_trained_network(checkpoint: str | Path, weights: str = "ema") -> Backbone:
    """Load a trained student on the CPU in float32. Its adapters are attached but not merged.

    Args:
        checkpoint: run directory (its best checkpoint, else its latest) or checkpoint folder.
        weights: `ema` or `raw`.

    Raises:
        UserError: there is no checkpoint, it is damaged, or its base is missing.
    """
    source = open_source(checkpoint, weights)
    settings = None if source.adapter is None else source.adapter.network.adapter
    return _adapted(assemble(source.arguments, source.read_trained), settings, 0, source.adapter).eval()


def _on_device(
    arguments: Mapping[str, Any], read: Read, world: World, materials: Materials, prepare: Prepare
) -> Backbone:
    """Build a network and read its weights one by one. Under ZeRO-3 rank 0 reads each once, straight into shards."""
    if materials.zero_stage() < 3:
        with world.together():
            network = fill(prepare(build_empty(arguments)), read)
        return on_device(network, world.device)
    return build_sharded(lambda: prepare(network_class(arguments)(**arguments)), read, world)


def _storing(frozen: torch.dtype, trained: tuple[str, ...] | None) -> Prepare:
    """Store a network as `engine.frozen_precision` says.

    Args:
        frozen: dtype of its frozen linear layers.
        trained: names of modules that are trained; None means the whole network.
    """
    if frozen == torch.float32 or trained is None:
        return lambda network: network
    return partial(store_in_bfloat16, trained=trained)


def _adapted(
    network: Backbone, adapter: FullTraining | Lora | None, seed: int, trained: TrainedWeights | None
) -> Backbone:
    """Add the adapters to a network, with the trained weights if there are any."""
    if isinstance(adapter, Lora):
        add_lora(network, adapter, seed)
    if trained is not None:
        factors = {name: p for name, p in trainable_parameters(network).items() if ".lora_" in name}
        # Modules that the adapter trains whole were read with the network, where they may be in shards.
        _copy_trained(trained, factors)
    return network


@torch.no_grad()
def _copy_trained(part: TrainedWeights, parameters: Mapping[str, Parameter]) -> None:
    """Copy a run's trained weights into the parameters of the same names."""
    for name, parameter in parameters.items():
        parameter.copy_(part.tensors[name]())
