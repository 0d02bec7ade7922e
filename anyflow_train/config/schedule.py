"""Stages within a run: the steps of each, and its config (`objective.schedule`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from anyflow_train.config.decode import field_errors, validate
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError, UserErrors, raise_all

KEY = "objective.schedule"
# Groups whose keys a stage may change. Everything else of a run is built once.
GROUPS = ("objective", "times")
FIXED = ("objective.kind", KEY)


@dataclass(frozen=True)
class Stage:
    """Steps of a run that train with the same objective and times.

    Attributes:
        steps: steps of the stage; the last stage lasts until the end of the run.
        config: config of the run in these steps, without a schedule.
    """

    steps: range
    config: RunConfig


def stages(config: RunConfig) -> tuple[Stage, ...]:
    """Return the stages of a run in order: those of the schedule, and then one with the run's own keys.

    Stages after `config.steps` are left out.

    Raises:
        UserErrors: a change names a key that a stage cannot change, or has a wrong value.
    """
    plain = without_schedule(config)
    found, errors, start = [], [], 0
    for number, part in enumerate(config.objective.schedule):
        try:
            changed = _changed(plain, part.changes)
        except UserErrors as problems:
            errors += [UserError(f"{KEY}.{number}", f"{each.where}: {each.problem}") for each in problems.errors]
            continue
        found.append(Stage(range(start, min(start + part.steps, config.steps)), changed))
        start += part.steps
    raise_all(errors)
    found.append(Stage(range(start, config.steps), plain))
    return tuple(stage for stage in found if stage.steps)


def mean_over(config: RunConfig, values: Sequence[float], steps: range) -> float:
    """Average a value of each stage over some of the run's steps."""
    pairs = list(zip(stages(config), values, strict=True))
    return fmean(value for step in steps for stage, value in pairs if step in stage.steps)


def without_schedule(config: RunConfig) -> RunConfig:
    """Return the config of a run that has its own keys in all steps."""
    return config.model_copy(update={"objective": config.objective.model_copy(update={"schedule": ()})})


def _changed(config: RunConfig, changes: dict[str, object]) -> RunConfig:
    """Decode a stage's config. Raises UserErrors with the dotted keys of the changes."""
    inner = tuple(f"{group}." for group in GROUPS)
    errors = [UserError(key, _refusal(key)) for key in changes if key in FIXED or not key.startswith(inner)]
    groups = {}
    for group in GROUPS:
        now = getattr(config, group)
        values = now.model_dump(mode="json")
        for key, value in changes.items():
            if key.startswith(f"{group}.") and key not in FIXED:
                _set(values, key.partition(".")[2], value)
        groups[group], details = validate(type(now), values)
        errors += [UserError(f"{group}.{key}", text) for _, key, text in field_errors(type(now), values, details)]
    raise_all(errors)
    return config.model_copy(update=groups)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. A mapping changes the keys that it names and keeps the others."""
    first, _, rest = key.partition(".")
    inner, parts = values.get(first), {rest: value} if rest else value
    if not isinstance(inner, dict) or not isinstance(parts, dict):
        values[first] = parts
        return
    for name, part in parts.items():
        _set(inner, name, part)


def _refusal(key: str) -> str:
    if key in FIXED:
        return "is the same in all stages of a run; change it in a run of its own"
    return f"a stage changes keys of {' and '.join(GROUPS)}, written in full, such as times.diffusion_share"
