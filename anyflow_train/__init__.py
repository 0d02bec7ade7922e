"""Distil a video diffusion teacher into an any-step student (AnyFlow, arXiv 2605.13724).

`_EXPORTS` lists the public names. They are imported on first use: importing this package does not import torch, so that
the command line starts quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Name -> module that defines it.
_EXPORTS = {
    "AnyFlowFARTransformer3DModel": "anyflow_train.models.far_transformer",
    "AnyFlowTransformer3DModel": "anyflow_train.models.transformer",
    "Batch": "anyflow_train.data.batch",
    "Codec": "anyflow_train.models.codec",
    "Condition": "anyflow_train.flow.types",
    "DistributionMatchingObjective": "anyflow_train.objectives.distribution_matching",
    "Draw": "anyflow_train.flow.draw",
    "FlowMapObjective": "anyflow_train.objectives.flow_map",
    "FlowMatchingObjective": "anyflow_train.objectives.flow_matching",
    "LagrangianObjective": "anyflow_train.objectives.lagrangian",
    "LoadedNetwork": "anyflow_train.evaluation.load",
    "Loss": "anyflow_train.objectives.types",
    "MixedObjective": "anyflow_train.objectives.mixed",
    "ObjectiveConfig": "anyflow_train.config.objective",
    "Roles": "anyflow_train.objectives.types",
    "SemigroupObjective": "anyflow_train.objectives.semigroup",
    "Setting": "anyflow_train.objectives.types",
    "Times": "anyflow_train.config.objective",
    "compose": "anyflow_train.config.compose",
    "load_student": "anyflow_train.evaluation.load",
    "load_teacher": "anyflow_train.evaluation.load",
    "sample": "anyflow_train.flow.sampler",
    "train": "anyflow_train.commands.train",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_EXPORTS]
