"""Dry runs that several tests need are made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from anyflow_train.config.run import RunConfig
from anyflow_train.plan import command, fit, shortage
from anyflow_train.plan.dry_run import DryRun


@pytest.fixture(scope="package", autouse=True)
def shared_dry_runs() -> Iterator[None]:
    """In place of the dry runs of `anyflow plan`, of its search for what fits, and of a start."""
    made: dict[Any, DryRun] = {}

    def once(call: Callable[..., DryRun]) -> Callable[..., DryRun]:
        def dry_run(config: RunConfig, *others: Any) -> DryRun:
            key = (call.__name__, config.model_dump_json(), others)
            if key not in made:
                made[key] = call(config, *others)
            return made[key]

        return dry_run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "dry_run", once(command.dry_run))
        patch.setattr(shortage, "dry_run", once(shortage.dry_run))
        patch.setattr(fit, "dry_run_memory", once(fit.dry_run_memory))
        yield
