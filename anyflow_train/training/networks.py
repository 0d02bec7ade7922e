"""The networks of a run, on their device: from files, from random weights, from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from anyflow_train.config.network import Architecture, FullTraining, Lora, Student
from anyflow_train.errors import UserError
from anyflow_train.models.adapters import add_lora, trainable_parameters
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.build import Read, assemble, build_network, network_class
from anyflow_train.models.devices import on_device
from anyflow_train.models.shared_base import SharedBase
from anyflow_train.training.engine import build_sharded, shard_frozen
from anyflow_train.training.materials import REAL, Materials
from anyflow_train.training.processes.world import World
from anyflow_train.training.weight_source import (
    TrainedWeights,
    WeightSource,
    open_source,
    raise_all,
)

# In what networks must agree that are called with the same latents and texts.
INTERFACE = ("in_channels", "out_channels", "text_dim")


def start_student(config: Student, seed: int, world: World, materials: Materials = REAL) -> Backbone:
    """The student on its device; under ZeRO-3 one that starts from trained weights is in shards from the first."""
    if config.init is None or materials.zero_stage() < 3:
        return on_device(world.together(lambda: build_student(config, seed, materials)), world.device)
    start = world.together(lambda: materials.open_student(config))
    return _adapted(_on_device(start.arguments, start.read_trained, world, materials), config.adapter, seed, start)


def build_student(config: Student, seed: int, materials: Materials = REAL) -> Backbone:
    """The student on the CPU in float32, adapters attached.

    Raises:
        UserError: `student.init` cannot be loaded; UserErrors: it has another shape or other times than the student.
    """
    if config.init is not None:
        start = materials.open_student(config)
        return _adapted(assemble(start.arguments, start.read_trained), config.adapter, seed, start)
    times = {"gate_value": config.gate_value, "deltatime_type": config.deltatime_type}
    network = build_network({**config.architecture.arguments(), **times}, seed, config.time_frequency_limit)
    if isinstance(config.adapter, Lora):
        add_lora(network, config.adapter, seed)
    return network


def start_shared(config: Student, seed: int, world: World, materials: Materials = REAL) -> SharedBase:
    """The student as the role `student` on a base that others can share; its adapters begin as `start_student`'s do.

    Raises:
        UserError: the student has no adapters, or cannot start.
    """
    if config.init is None or not isinstance(config.adapter, Lora):
        raise UserError(
            "student.adapter", "trains the whole network, which nobody can share; choose student/adapter=lora"
        )
    start = world.together(lambda: materials.open_student(config))
    network = _on_device(start.arguments, start.read, world, materials)
    shared = SharedBase(network, start.read if materials.zero_stage() == 3 else None)
    shared.add("student", config.adapter, seed, "student.adapter")
    if start.adapter is not None:
        _hand_on(start.adapter, shared.parameters("student"))
    return shared


def share_frozen(
    shared: SharedBase, role: str, source: str | None, student: Student, key: str, materials: Materials = REAL
) -> str | None:
    """As which role a shared base is the network of a source, frozen: None for the bare base, else `role`, now added.

    Args:
        source: the network that the student's base is, or a run that trained an adapter on it.
        student: whose base it is.
        key: config key that names the source.

    Raises:
        UserError: the source is another network, or is not itself under the student's second time.
    """
    if student.deltatime_type != "r" and student.gate_value != 0:
        problem = f"{student.deltatime_type!r} gives a base another meaning than {key}'s, also at r = t; set it to r"
        raise UserError("student.deltatime_type", f"{problem}, or give each role a network of its own")
    base, wanted = materials.open_student(student), materials.open_role(key, str(source))
    paths = [[part.path for part in start.parts] for start in (base, wanted)]
    if wanted.source == base.source and paths[0] == paths[1]:
        return None
    last = wanted.parts[-1] if wanted.parts else None
    if last is None or last.network.adapter is None or wanted.source != base.source or paths[0] != paths[1][:-1]:
        problem = f"{source} is not {base.source}, on which the student's adapter sits, nor an adapter on it"
        raise UserError(key, f"{problem}; give each role a network of its own")
    if last.network.times["gate_value"] != student.gate_value and any("time_embedder" in name for name in last.tensors):
        raise UserError(key, f"{source} trained its time embedder at another gate; give each role a network of its own")
    shared.add(role, last.network.adapter, 0, key)
    _hand_on(last, shared.parameters(role))
    shared.freeze(role)
    return role


def start_teacher(source: str | None, student: Architecture, world: World, materials: Materials = REAL) -> Backbone:
    """The frozen teacher on its device, under ZeRO-3 in shards. At r = t it is the teacher, whatever its gate.

    Raises:
        UserError: `teacher.source` names none; UserErrors: it has other latents or texts than the student.
    """
    if source is None:
        raise UserError("teacher.source", "is null, but the run needs a teacher; name the teacher's folder")
    network = _start("teacher.source", source, student, world, materials)
    network.split_sequence(world.sequence_group)
    network.requires_grad_(False)
    return network if materials.zero_stage() < 3 else shard_frozen(network)


def start_fake_score(source: str, student: Architecture, world: World, materials: Materials = REAL) -> Backbone:
    """The fake score on its device, under ZeRO-3 in shards, all of it to be trained. It is only called at r = t.

    Raises:
        UserError: `on_policy.fake_score.init` names none; UserErrors: it has other latents or texts than the student.
    """
    return _start("on_policy.fake_score.init", source, student, world, materials)


def load_trained_network(checkpoint: str | Path, weights: str = "ema") -> Backbone:
    """A trained student on the CPU in float32, adapters attached but not merged.

    Args:
        checkpoint: run directory (its best checkpoint, else its latest) or checkpoint folder.
        weights: `ema` or `raw`.

    Raises:
        UserError: there is no checkpoint, it is damaged, or what it started from is gone.
    """
    source = open_source(checkpoint, weights)
    settings = None if source.adapter is None else source.adapter.network.adapter
    return _adapted(assemble(source.arguments, source.read_trained), settings, 0, source).eval()


def _start(key: str, source: str, student: Architecture, world: World, materials: Materials) -> Backbone:
    """The whole network of a source, or its shards under ZeRO-3. It may have another size than the student."""
    start = world.together(lambda: materials.open_role(key, source))
    if "chunk_partition" in start.arguments:
        raise UserError(key, f"{source} is a causal student; name a network that makes whole clips")
    wanted = student.model_dump()
    raise_all(
        [
            UserError(key, f"{source} has {name}={start.arguments.get(name, wanted[name])}, the student {wanted[name]}")
            for name in INTERFACE
            if start.arguments.get(name, wanted[name]) != wanted[name]
        ]
    )
    return _on_device(start.arguments, start.read, world, materials)


def _on_device(arguments: Mapping[str, Any], read: Read, world: World, materials: Materials) -> Backbone:
    """A network whose weights are read one by one; under ZeRO-3 by rank 0, each once, straight into shards."""
    if materials.zero_stage() < 3:
        return on_device(world.together(lambda: assemble(arguments, read)), world.device)
    return build_sharded(lambda: network_class(arguments)(**arguments), read, world)


def _adapted(network: Backbone, adapter: FullTraining | Lora | None, seed: int, source: WeightSource) -> Backbone:
    """With adapters; if the source has the same ones, with their weights."""
    if isinstance(adapter, Lora):
        add_lora(network, adapter, seed)
    if source.adapter is not None:
        factors = {name: p for name, p in trainable_parameters(network).items() if ".lora_" in name}
        _hand_on(source.adapter, factors)  # its whole modules were read with the network, where they may be in shards
    return network


@torch.no_grad()
def _hand_on(part: TrainedWeights, parameters: Mapping[str, Parameter]) -> None:
    """Put what a run trained into parameters of the same names."""
    for name, parameter in parameters.items():
        parameter.copy_(part.tensors[name]())
