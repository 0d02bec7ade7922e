"""`anyflow plan`: predict what a run needs, before anything is downloaded or started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from anyflow_train.config.commands import PlanOptions
from anyflow_train.config.commands.types import StrategyName
from anyflow_train.config.compose import compose
from anyflow_train.config.network import FullTraining
from anyflow_train.config.options import compose_beside, split
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from anyflow_train.plan.dry_run import dry_run
from anyflow_train.plan.fit import nearest_fit
from anyflow_train.plan.memory import plan_memory
from anyflow_train.plan.report import advice, report
from anyflow_train.text import GIB
from anyflow_train.training.gpus import GPUS
from anyflow_train.training.start_checks import check_strategy

FITS, DOES_NOT_FIT = 0, 1


def run(overrides: Sequence[str], config_dir: Path | None) -> int:
    """Print the plan; the exit code is 1 where the run does not fit.

    Raises:
        UserErrors: of the run's keys and of the command's own, together.
    """
    _check_strategy(overrides)
    options, config = compose_beside(PlanOptions, overrides, config_dir, lambda options: options.world)
    check_strategy(config, options.strategy)
    found = dry_run(config, options.world)
    memory = plan_memory(config, found, options.strategy, options.world)
    print(report(config, options, found, memory))
    limit = GPUS[options.gpu].memory * GIB
    if memory.total <= limit:
        return FITS
    lora = _with_adapters(config, overrides, config_dir, options.world)
    nearest = nearest_fit(config, lora, options.strategy, options.world, limit, found)
    print(f"\n{advice(nearest, options)}")
    return DOES_NOT_FIT


def _check_strategy(overrides: Sequence[str]) -> None:
    """Name the right key where the group `engine` is given a strategy."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "engine" and value in get_args(StrategyName):
            raise UserError(
                "engine", f"has the choices cpu and gpu; for the launcher's strategy write strategy={value}"
            )


def _with_adapters(
    config: RunConfig, overrides: Sequence[str], config_dir: Path | None, world: int
) -> RunConfig | None:
    """Config of the run with the shipped adapters in place of full training; None where that is not possible."""
    if not isinstance(config.student.adapter, FullTraining):
        return None
    _, others = split(PlanOptions, overrides, config_dir)
    others = [text for text in others if not text.startswith("student/adapter=")]
    try:
        return compose("train", [*others, "student/adapter=lora"], config_dir, world)
    except UserError:
        return None
