"""Sources of the networks and engines of a run: files and optimizers, or the stand-ins of a dry run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn import Parameter

from anyflow_train.config.network import Student
from anyflow_train.config.run import Optimizer
from anyflow_train.training.engine import Engine, build_engine, zero_stage
from anyflow_train.training.processes.world import World
from anyflow_train.training.weight_source import WeightSource, open_role, open_student_start

BuildEngine = Callable[[World, nn.Module, Mapping[str, Parameter], Optimizer], Engine]


@dataclass(frozen=True)
class Materials:
    """Functions that open weights and build engines.

    Attributes:
        open_student: opens the weights that a student starts from.
        open_role: opens the weights that a config key names; called with (key, source).
        build_engine: makes the engine of a role.
        zero_stage: returns the ZeRO stage by which networks and engines are cut over the processes.
    """

    open_student: Callable[[Student], WeightSource] = open_student_start
    open_role: Callable[[str, str], WeightSource] = open_role
    build_engine: BuildEngine = build_engine
    zero_stage: Callable[[], int] = zero_stage


REAL = Materials()
"""Weights from files, and the engine that the launcher asks for."""
