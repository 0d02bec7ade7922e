"""Engines: one optimizer per trained role, replicated on every process or sharded by ZeRO.

All engines keep float32 master parameters. bf16 is an autocast over them, so that some modules can stay in float32 and
gradients are summed in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn import Parameter

from anyflow_train.config.run import Optimizer as OptimizerConfig
from anyflow_train.training.engine.adamw import adam_steps as adam_steps
from anyflow_train.training.engine.adamw import set_adam_steps as set_adam_steps
from anyflow_train.training.engine.replicated import ReplicatedEngine
from anyflow_train.training.engine.types import Engine
from anyflow_train.training.engine.types import Outcome as Outcome
from anyflow_train.training.engine.zero import ZeroEngine, zero_stage
from anyflow_train.training.engine.zero import build_sharded as build_sharded
from anyflow_train.training.engine.zero import engine_name as engine_name
from anyflow_train.training.engine.zero import shard_frozen as shard_frozen
from anyflow_train.training.processes.world import World


def build_engine(
    world: World, network: nn.Module, parameters: Mapping[str, Parameter], config: OptimizerConfig
) -> Engine:
    """Build the engine for the launcher's strategy.

    Args:
        network: network on `world.device` that holds the parameters.
        parameters: trained parameters by model name, float32.
    """
    if zero_stage() == 0:
        return ReplicatedEngine(world, network, parameters, config)
    return ZeroEngine(world, network, parameters, config)
