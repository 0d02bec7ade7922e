"""The runs of a sweep: every variant with every combination of values."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyflow_train.config.commands import SweepOptions
from anyflow_train.config.compose import compose, config_folders
from anyflow_train.config.groups import EXPERIMENT, find_groups
from anyflow_train.config.overrides import parse
from anyflow_train.config.run import RunConfig
from anyflow_train.config.schedule import stages
from anyflow_train.errors import UserError, raise_all
from anyflow_train.text import quoted

# File systems allow 255 bytes; names of temporary checkpoint folders add some.
LONGEST_LABEL = 160
ARM = "arm"
SEED = "seed"


@dataclass
class Combination:
    """One run of a sweep.

    Attributes:
        label: name of the run directory, such as `lr-0.001_guidance-target`.
        values: swept key -> value, as written; the key `arm` has the name of the variant.
        given: the other arguments of `anyflow train`.
        config: decoded config of the run.
        state: finished, failed, stopped, or waiting.
        summary: facts about a finished run: step, last_loss, seconds of training over all starts, and metrics.
        cpu_seconds: CPU time of all its processes, over all starts.
        operations: floating-point operations of the whole run; None if they are not counted.
    """

    label: str
    values: dict[str, str]
    given: Sequence[str]
    config: RunConfig
    state: str = "waiting"
    summary: dict[str, Any] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    operations: float | None = None

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.config.out).expanduser() / self.config.name

    @property
    def overrides(self) -> list[str]:
        """Arguments of `anyflow train`."""
        place = [f"out={quoted(self.config.out)}", f"name={quoted(self.label)}"]
        counted = [] if self.operations is None else [f"steps={self.config.steps}"]
        return [*self.given, *written(self.values), *counted, *place]

    @property
    def group(self) -> str:
        """Name of the runs that differ from this one only by the seed."""
        others = [self.values[ARM]] if ARM in self.values else []
        return ", ".join([*others, *(f"{k}={v}" for k, v in self.values.items() if k not in (ARM, SEED))]) or "all"

    def update(self, otherwise: str) -> None:
        """Read the state from the run directory; `otherwise` is the state of a run that is not finished."""
        from anyflow_train.training.checkpoints.run_directory import RunDirectory

        self.state, done = otherwise, RunDirectory(self.folder).read_done()
        if done is not None and done["step"] >= self.config.steps:
            self.state, self.summary = "finished", done


def split_options(arguments: Sequence[str], config_dir: Path | None) -> tuple[SweepOptions, list[str]]:
    """Decode the sweep's own keys. Return them, and the arguments of its runs, as written.

    An experiment belongs to the sweep if its file says so.

    Raises:
        UserErrors: errors of the sweep's own keys.
    """
    experiments = find_groups(config_folders(config_dir)).get(EXPERIMENT, {})
    own: list[str] = []
    others: list[str] = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        is_own = key.partition(".")[0] in SweepOptions.model_fields or key in SweepOptions.aliases
        if key == EXPERIMENT and value in experiments:
            is_own = experiments[value].command == "sweep"
        (own if is_own else others).append(argument)
    return compose("sweep", own, config_dir), others


def combine(options: SweepOptions, arguments: Sequence[str], config_dir: Path | None) -> list[Combination]:
    """Decode all combinations, whose run directories are in `<out>/<name>` of the first one's config.

    Raises:
        UserErrors: all errors of all combinations, each once; or there is only one combination.
    """
    settings, errors = parse([*options.train, *arguments])
    last = {setting.key: setting for setting in settings}  # a key of the command line replaces that of `train`
    axes = {key: setting.alternatives() for key, setting in last.items() if len(setting.alternatives()) > 1}
    problem = "{!r} has several values, but a sweep has one folder, <out>/<name>; give one"
    errors += [UserError(key, problem.format(",".join(axes[key]))) for key in ("name", "out") if key in axes]
    if not axes and not options.arms and not errors:
        errors.append(UserError("sweep", "no key has several values; write key=a,b (write a list as 'key=[a,b]')"))
    raise_all(errors)
    fixed = [f"{key}={setting.text}" for key, setting in last.items() if key not in axes]
    found: dict[str, UserError] = {}
    combinations: list[Combination] = []
    arms: Mapping[str, Sequence[str]] = options.arms or {"": ()}
    for arm, *texts in itertools.product(arms, *axes.values()):
        values = ({ARM: arm} if arm else {}) | dict(zip(axes, texts, strict=True))
        given = [*_without(fixed, arms[arm]), *arms[arm]]
        try:
            config = compose("train", [*given, *written(values)], config_dir)
            combinations.append(Combination("", values, given, config))
        except UserError as error:
            found |= {str(one): one for one in (error.within(f"arms.{arm}") if arm else error.errors)}
    raise_all([*found.values()])
    out = str(Path(combinations[0].config.out) / combinations[0].config.name)
    for combination, label in zip(combinations, _labels([one.values for one in combinations]), strict=True):
        combination.label = label
        combination.config = combination.config.model_copy(update={"out": out, "name": label})
    return combinations


def equalise(combinations: Sequence[Combination]) -> None:
    """Set the steps of every run, so that all take about as many operations as the first one.

    Operations are those of the dry run. A schedule's stages keep their steps; the last stage gets the rest.

    Raises:
        UserErrors: a schedule alone takes more operations.
    """
    from anyflow_train.plan.dry_run import dry_run  # imports torch

    counted: dict[str, tuple[float, ...]] = {}
    budget, errors = None, []
    for one in combinations:
        same = one.config.model_copy(update={"seed": 0, "name": ""}).model_dump_json()
        if same not in counted:
            counted[same] = dry_run(one.config, 1).stages
        works, parts = counted[same], stages(one.config)
        before = sum(work * len(part.steps) for work, part in zip(works[:-1], parts[:-1], strict=True))
        if budget is None:
            budget = before + works[-1] * len(parts[-1].steps)
        steps = parts[-1].steps.start + round((budget - before) / works[-1])
        if steps <= parts[-1].steps.start:
            errors.append(UserError("objective.schedule", f"takes more operations than the first run ({one.label})"))
            continue
        one.operations = before + works[-1] * (steps - parts[-1].steps.start)
        one.config = one.config.model_copy(update={"steps": steps})
    raise_all(errors)


def check_directories(combinations: Sequence[Combination]) -> None:
    """Check that existing run directories have the same configs.

    Raises:
        UserErrors: a key changed that a resumed run cannot change.
    """
    # Imported here, because it imports torch, and errors of the configs should not wait for that.
    from anyflow_train.training.checkpoints.inputs import Inputs
    from anyflow_train.training.checkpoints.resume import check_unchanged
    from anyflow_train.training.checkpoints.run_directory import RunDirectory

    errors: list[UserError] = []
    for combination in combinations:
        folder = combination.folder
        if (folder / "config.json").exists():
            try:
                directory = RunDirectory(folder)
                inputs = Inputs.of(combination.config, directory)
                check_unchanged(directory.read_config() or {}, combination.config, str(folder), inputs)
            except UserError as error:
                errors += [UserError(one.where, f"{one.problem} ({folder})") for one in error.errors]
    raise_all(errors)


def _without(settings: Sequence[str], replaced: Sequence[str]) -> list[str]:
    """Leave out the arguments whose key an arm sets itself."""
    keys = {text.partition("=")[0] for text in replaced}
    return [text for text in settings if text.partition("=")[0] not in keys]


def written(chosen: Mapping[str, str]) -> list[str]:
    """Write the swept values of a run as arguments of `anyflow train`."""
    return [f"{key}={text}" for key, text in chosen.items() if key != ARM]


def _labels(values: Sequence[Mapping[str, str]]) -> list[str]:
    """Name the run directories: short keys if they are unambiguous, and no characters that need quotes."""
    last = {key: re.split(r"[./]", key)[-1] for key in values[0]}
    keys = Counter(last.values())
    short = {key: name if keys[name] == 1 else key.replace("/", ".") for key, name in last.items()}
    labels = [
        "_".join(_clean(text) if key == ARM else f"{short[key]}-{_clean(text)}" for key, text in chosen.items())
        for chosen in values
    ]
    counts = Counter(labels)
    return [
        label if counts[label] == 1 and len(label) <= LONGEST_LABEL else f"{number:03d}_{label}"[:LONGEST_LABEL]
        for number, label in enumerate(labels)
    ]


def _clean(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-") or "empty"
