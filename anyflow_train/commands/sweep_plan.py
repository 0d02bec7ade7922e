"""Combinations of a sweep: all are decoded before the first run starts."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from anyflow_train.config.compose import compose
from anyflow_train.config.overrides import parse
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError, UserErrors

# File systems allow 255 bytes; names of temporary checkpoint folders add some.
LONGEST_LABEL = 160


@dataclass(frozen=True)
class Combination:
    """One run of a sweep.

    label: name of the run directory, such as `lr=0.001,guidance=target`.
    values: swept key -> value, as written.
    overrides: arguments of `anyflow train`.
    config: decoded config of the run.
    """

    label: str
    values: dict[str, str]
    overrides: tuple[str, ...]
    config: RunConfig

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.config.out).expanduser() / self.config.name


@dataclass(frozen=True)
class SweepPlan:
    """The sweep's folder (`<out>/<name>` of the common config) and its runs."""

    folder: Path
    combinations: tuple[Combination, ...]


def make_plan(overrides: Sequence[str], config_dir: Path | None) -> SweepPlan:
    """Decode all combinations.

    Raises:
        UserErrors: all errors of all combinations, each once; or no key has several values.
    """
    settings, errors = parse(overrides)
    axes = [setting for setting in settings if len(setting.alternatives()) > 1]
    errors += [
        UserError(axis.key, f"{axis.text!r} has several values, but a sweep has one folder, <out>/<name>; give one")
        for axis in axes
        if axis.key in ("name", "out")
    ]
    if not axes and not errors:
        errors.append(UserError("sweep", "no key has several values; write key=a,b (write a list as 'key=[a,b]')"))
    if errors:
        raise UserErrors(errors)
    fixed = [f"{setting.key}={setting.text}" for setting in settings if setting not in axes]
    keys = [axis.key for axis in axes]
    products = itertools.product(*(axis.alternatives() for axis in axes))
    values = [dict(zip(keys, texts, strict=True)) for texts in products]
    configs = _decode_all([[*fixed, *_written(chosen)] for chosen in values], config_dir)
    folder = Path(configs[0].out) / configs[0].name
    return SweepPlan(folder, tuple(map(partial(_combination, folder, fixed), values, _labels(values), configs)))


def _combination(
    folder: Path, fixed: Sequence[str], chosen: dict[str, str], label: str, config: RunConfig
) -> Combination:
    overrides = (*fixed, *_written(chosen), f"out={_quoted(str(folder))}", f"name={_quoted(label)}")
    return Combination(label, chosen, overrides, config.model_copy(update={"out": str(folder), "name": label}))


def _quoted(text: str) -> str:
    escaped = text.replace("'", "\\'")
    return f"'{escaped}'"


def _written(chosen: dict[str, str]) -> list[str]:
    return [f"{key}={text}" for key, text in chosen.items()]


def _decode_all(all_overrides: Sequence[list[str]], config_dir: Path | None) -> list[RunConfig]:
    configs: list[RunConfig] = []
    errors: dict[str, UserError] = {}
    for overrides in all_overrides:
        try:
            configs.append(compose("train", overrides, config_dir))
        except UserError as error:
            errors |= {str(one): one for one in error.each()}
    if errors:
        raise UserErrors(list(errors.values()))
    return configs


def _labels(values: Sequence[dict[str, str]]) -> list[str]:
    """Name the run directories: short keys if they are unambiguous, and only allowed characters."""
    short = _short_keys(list(values[0]))
    labels = [",".join(f"{short[key]}={_clean(text)}" for key, text in chosen.items()) for chosen in values]
    counts = Counter(labels)
    return [
        label if counts[label] == 1 and len(label) <= LONGEST_LABEL else f"{number:03d},{label}"[:LONGEST_LABEL]
        for number, label in enumerate(labels)
    ]


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    last = {key: re.split(r"[./]", key)[-1] for key in keys}
    counts = Counter(last.values())
    return {key: name if counts[name] == 1 else key.replace("/", ".") for key, name in last.items()}


def _clean(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-") or "empty"
