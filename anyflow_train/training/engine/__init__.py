"""One optimizer per trainable role, with an explicit step boundary: replicated on every process, or sharded by ZeRO.

Parameters are float32 masters under every engine. bf16 is an autocast over them, so that the modules that must stay
float32 do, and gradients are summed in float32.
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
    "ZeroEngine",
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
    """The engine that the launcher asks for.

    Args:
        network: on `world.device`, holds the parameters.
        parameters: the trained ones by model name; float32.
    """
    if zero_stage() == 0:
        return ReplicatedEngine(world, network, parameters, config)
    return ZeroEngine(world, network, parameters, config)
