"""Engines: one optimizer per trained role, replicated on every process or sharded by ZeRO.

All engines keep float32 master parameters. bf16 is an autocast over them, so that some modules can stay in float32 and
gradients are summed in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn import Parameter

from anyflow_train.config.run import Optimizer as OptimizerConfig
from anyflow_train.training.engine.adamw import adam_steps, set_adam_steps
from anyflow_train.training.engine.replicated import ReplicatedEngine
from anyflow_train.training.engine.types import Engine, Outcome
from anyflow_train.training.engine.zero import ZeroEngine, build_sharded, engine_name, shard_frozen, zero_stage
from anyflow_train.training.processes.world import World

__all__ = [
    "Engine",
    "Outcome",
    "ReplicatedEngine",
    "adam_steps",
    "build_engine",
    "build_sharded",
    "engine_name",
    "set_adam_steps",
    "shard_frozen",
    "zero_stage",
]


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
