"""Build the networks of all roles, before their optimizers: one network per role, or adapters on one frozen base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from anyflow_train.config.derived import adapter_on_shared_base, needs_teacher, shares_base
from anyflow_train.config.run import RunConfig
from anyflow_train.devices import DTYPES
from anyflow_train.flow.types import FlowMap
from anyflow_train.models.adapters import trainable_parameters
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.models.fp8 import multiply_in_fp8, store_in_fp8
from anyflow_train.models.recompute import RECOMPUTE
from anyflow_train.training.materials import REAL, Materials
from anyflow_train.training.networks import (
    share_frozen,
    start_role,
    start_shared,
    start_student,
    start_teacher,
)
from anyflow_train.training.processes.world import World

MOST_COMPILATIONS = 256
MakeFlowMap = Callable[[Any, torch.dtype | None], FlowMap]


@dataclass(frozen=True)
class RoleNetwork:
    """The network of a trained role.

    Attributes:
        network: the network that the role's engine wraps.
        parameters: trained parameters, by their names in checkpoints.
        flow_map: builds the role's flow map from the engine's network and the dtype of autocast (None: no autocast).
    """

    network: Backbone
    parameters: Mapping[str, Parameter]
    flow_map: MakeFlowMap


@dataclass(frozen=True)
class RoleNetworks:
    """The networks of all roles. A teacher that shares the student's network is called through the student's engine."""

    student: RoleNetwork
    teacher: MakeFlowMap | None
    fake_score: RoleNetwork | None


def build_roles(config: RunConfig, world: World, materials: Materials = REAL) -> RoleNetworks:
    """Build the networks of a run on their device.

    Raises:
        UserError: a network cannot be loaded, differs from the config, or cannot share the base.
    """
    settings, shape = config.on_policy.matching, config.student.architecture
    if shares_base(config):
        return _on_one_base(config, world, materials)
    dtype = DTYPES[config.engine.stored_frozen]
    student = _role_network(start_student(config.student, config.seed, world, materials, dtype), config, world)
    if not needs_teacher(config):
        return RoleNetworks(student, None, None)
    frozen = start_teacher(config.teacher.source, shape, world, materials, dtype)
    if config.engine.fp8 == "frozen":
        store_in_fp8(frozen)
    if config.engine.compile:
        _compile_blocks(frozen)
    fake_score = None
    if settings is not None:
        network = start_role("on_policy.fake_score.init", settings.fake_score.init, shape, world, materials)
        fake_score = _role_network(network, config, world)
    return RoleNetworks(student, lambda _, dtype: NetworkFlowMap(frozen, dtype), fake_score)


def _role_network(network: Backbone, config: RunConfig, world: World) -> RoleNetwork:
    if config.engine.fp8 == "frozen":
        multiply_in_fp8(network)
    return RoleNetwork(_prepared(network, config, world), trainable_parameters(network), NetworkFlowMap)


def _on_one_base(config: RunConfig, world: World, materials: Materials) -> RoleNetworks:
    """Build the student, and the fake score if there is one, as adapters on the teacher's frozen network."""
    shared = start_shared(config.student, config.seed, world, materials, DTYPES[config.engine.stored_frozen])
    shared.compiled = config.engine.compile
    network, fake_adapter = _prepared(shared.network, config, world), adapter_on_shared_base(config)
    if fake_adapter is not None:
        # The seed differs from the student's: with equal random factors the two adapters would start correlated.
        shared.add("fake_score", fake_adapter, config.seed + 1, "on_policy.fake_score.adapter")
    with world.together():
        source = config.teacher.source
        teacher = share_frozen(shared, "teacher", source, config.student, "teacher.source", materials)

    def as_role(role: str | None) -> MakeFlowMap:
        return lambda called, dtype: shared.flow_map(role, NetworkFlowMap(called, dtype))

    def trained(role: str) -> RoleNetwork:
        return RoleNetwork(network, shared.parameters(role), as_role(role))

    if config.engine.fp8 == "frozen":
        multiply_in_fp8(network)
    return RoleNetworks(trained("student"), as_role(teacher), None if fake_adapter is None else trained("fake_score"))


def _prepared(network: Backbone, config: RunConfig, world: World) -> Backbone:
    """Set up a trained network as the config says: sequence parallelism, compilation, gradient checkpointing."""
    if world.sequence_group is not None:
        network.split_sequence(world.sequence_group)
    recompute = RECOMPUTE.get(config.student.gradient_checkpointing)
    if config.engine.compile:
        _compile_blocks(network)
        recompute = recompute and torch.compile(recompute, fullgraph=True)
    if recompute is not None:
        network.enable_gradient_checkpointing(recompute)
    return network


def _compile_blocks(network: Backbone) -> None:
    """Compile the blocks of a network one by one, together with their recomputation. They share a compiled function.

    It is compiled again for every role, sequence of chunks, number of samples and text length, with and without
    gradient. That is dozens of times; torch's default limit is 8.
    """
    limits: Any = torch._dynamo.config
    limits.recompile_limit = limits.accumulated_recompile_limit = MOST_COMPILATIONS
    network.compile_repeated_blocks(fullgraph=True)
