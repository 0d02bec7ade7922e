"""Table of a sweep's results, for the terminal and the sweep's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from anyflow_train.commands.sweep_plan import SweepPlan
from anyflow_train.text import markdown_table


@dataclass(frozen=True)
class RunOutcome:
    """Result of one combination.

    state: finished, failed, stopped, or waiting.
    seconds: training time over all starts of the run.
    """

    label: str
    values: dict[str, str]
    state: str
    folder: str
    step: int | None = None
    last_loss: float | None = None
    seconds: float | None = None
    metrics: dict[str, float] | None = None


def markdown(outcomes: Sequence[RunOutcome], best_metric: str) -> str:
    """Format one row per combination, with the best metric at all step counts."""
    metrics = _family(outcomes, best_metric)
    keys = list(outcomes[0].values)
    rows = [[*keys, "state", "last loss", *metrics, "time"]]
    for outcome in outcomes:
        measured = outcome.metrics or {}
        rows.append(
            [
                *outcome.values.values(),
                outcome.state,
                _number(outcome.last_loss),
                *(_number(measured.get(metric)) for metric in metrics),
                "" if outcome.seconds is None else f"{outcome.seconds:.0f} s",
            ]
        )
    return "\n".join(markdown_table(rows)) + "\n"


def write(plan: SweepPlan, outcomes: Sequence[RunOutcome], table: str) -> list[Path]:
    """Write `sweep.md` and `sweep.json` (with all metrics) to the sweep's folder."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    paths = [plan.folder / "sweep.md", plan.folder / "sweep.json"]
    paths[0].write_text(table, encoding="utf-8")
    paths[1].write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n", encoding="utf-8")
    return paths


def _family(outcomes: Sequence[RunOutcome], best_metric: str) -> list[str]:
    """List the same metric at every step count that a run measured: `energy_distance_4` -> `energy_distance_1`, ..."""
    stem = best_metric.rpartition("_")[0]
    found = {name for outcome in outcomes for name in outcome.metrics or {} if name.rpartition("_")[0] == stem}
    return sorted(found, key=lambda name: int(name.rpartition("_")[2]))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
