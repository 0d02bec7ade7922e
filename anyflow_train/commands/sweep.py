"""`anyflow sweep`: train one run per combination, each in its own process and directory, and write a table."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from anyflow_train.config.compose import compose
from anyflow_train.config.derived import world_size
from anyflow_train.config.overrides import parse
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError, raise_all
from anyflow_train.text import markdown_table

SUCCESS, FAILURE, INTERRUPTED = 0, 1, 130
# File systems allow 255 bytes; names of temporary checkpoint folders add some.
LONGEST_LABEL = 160


@dataclass
class Combination:
    """One run of a sweep.

    Attributes:
        label: name of the run directory, such as `lr=0.001,guidance=target`.
        values: swept key -> value, as written.
        fixed: the other arguments of `anyflow train`.
        config: decoded config of the run.
        state: finished, failed, stopped, or waiting.
        summary: facts about a finished run: step, last_loss, seconds of training over all starts, and metrics.
    """

    label: str
    values: dict[str, str]
    fixed: Sequence[str]
    config: RunConfig
    state: str = "waiting"
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.config.out).expanduser() / self.config.name

    @property
    def overrides(self) -> list[str]:
        """Arguments of `anyflow train`."""
        place = {"out": self.config.out, "name": self.label}
        quoted = [f"{key}='{text}'" for key, text in ((key, text.replace("'", "\\'")) for key, text in place.items())]
        return [*self.fixed, *_written(self.values), *quoted]

    def update(self, otherwise: str) -> None:
        """Read the state from the run directory; `otherwise` is the state of a run that is not finished."""
        from anyflow_train.training.checkpoints.run_directory import RunDirectory

        self.state, done = otherwise, RunDirectory(self.folder).read_done()
        if done is not None and done["step"] >= self.config.steps:
            self.state, self.summary = "finished", done


def run(overrides: Sequence[str], config_dir: Path | None) -> int:
    """Train all combinations that are not finished. An interrupted run resumes from its checkpoint.

    Returns:
        0 if all combinations are finished, 1 if some failed, 130 if a signal stopped the sweep.

    Raises:
        UserErrors: errors of all combinations, before the first run starts.
    """
    if world_size() > 1:
        raise UserError("WORLD_SIZE", f"{world_size()}, but a sweep starts its own runs; start it without a launcher")
    combinations = plan(overrides, config_dir)
    _check_directories(combinations)
    for combination in combinations:
        combination.update("waiting")
    runner = Runner(["--config-dir", str(config_dir)] if config_dir else [])
    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, runner.forward))
        for number, combination in enumerate(combinations, 1):
            if not runner.stopped:
                print(f"== {number}/{len(combinations)} {combination.label}", flush=True)
                runner.finish(combination)
                _report(combinations)
    print(_report(combinations), end="")
    if runner.stopped:
        return INTERRUPTED
    return FAILURE if any(combination.state == "failed" for combination in combinations) else SUCCESS


class Runner:
    """Starts runs one after another. A signal stops the current run cleanly and ends the sweep."""

    def __init__(self, options: Sequence[str]) -> None:
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.stopped = False

    def finish(self, combination: Combination) -> None:
        """Run a combination to its end, unless it is finished already."""
        if combination.state == "finished":
            print("already finished", flush=True)
            return
        command = [sys.executable, "-m", "anyflow_train", "train", *combination.overrides, *self._options]
        # In its own session, so that Ctrl-C reaches the run only once, through this process.
        self._process = subprocess.Popen(command, start_new_session=True)
        if self.stopped:  # a signal arrived while the run was being started
            self._process.terminate()
        code = self._process.wait()
        combination.update("stopped" if code == 0 or self.stopped else "failed")
        if combination.state == "failed":
            print(f"failed with exit code {code}; continuing with the next run", file=sys.stderr, flush=True)
        self.stopped |= combination.state == "stopped"

    def forward(self, number: int, _frame: FrameType | None) -> None:
        """Forward a signal to the current run, which finishes its step and saves."""
        self.stopped = True
        if self._process is not None:
            self._process.send_signal(number)  # does nothing if the run has ended


def plan(overrides: Sequence[str], config_dir: Path | None) -> list[Combination]:
    """Decode all combinations, whose run directories are in `<out>/<name>` of the first one's config.

    Raises:
        UserErrors: all errors of all combinations, each once; or no key has several values.
    """
    settings, errors = parse(overrides)
    axes = {setting.key: setting.alternatives() for setting in settings if len(setting.alternatives()) > 1}
    problem = "{!r} has several values, but a sweep has one folder, <out>/<name>; give one"
    errors += [UserError(key, problem.format(",".join(axes[key]))) for key in ("name", "out") if key in axes]
    if not axes and not errors:
        errors.append(UserError("sweep", "no key has several values; write key=a,b (write a list as 'key=[a,b]')"))
    raise_all(errors)
    fixed = [f"{setting.key}={setting.text}" for setting in settings if setting.key not in axes]
    values = [dict(zip(axes, texts, strict=True)) for texts in itertools.product(*axes.values())]
    configs: list[RunConfig] = []
    found: dict[str, UserError] = {}
    for chosen in values:
        try:
            configs.append(compose("train", [*fixed, *_written(chosen)], config_dir))
        except UserError as error:
            found |= {str(one): one for one in error.errors}
    raise_all([*found.values()])
    out = str(Path(configs[0].out) / configs[0].name)
    return [
        Combination(label, chosen, fixed, config.model_copy(update={"out": out, "name": label}))
        for label, chosen, config in zip(_labels(values), values, configs, strict=True)
    ]


def table(combinations: Sequence[Combination]) -> str:
    """Format one row per combination, with the best metric at every step count that a run measured."""
    stem = combinations[0].config.evaluation.best_metric.rpartition("_")[0]
    measured = {name for combination in combinations for name in combination.summary.get("metrics", {})}
    family = [name for name in measured if name.rpartition("_")[0] == stem]
    family.sort(key=lambda name: int(name.rpartition("_")[2]))
    rows = [[*combinations[0].values, "state", "last loss", *family, "time"]]
    for combination in combinations:
        done = combination.summary
        numbers = [done.get("last_loss"), *(done.get("metrics", {}).get(name) for name in family)]
        shown = ["" if number is None else f"{number:.4g}" for number in numbers]
        seconds = f"{done['seconds']:.0f} s" if done else ""
        rows.append([*combination.values.values(), combination.state, *shown, seconds])
    return "\n".join(markdown_table(rows)) + "\n"


def _check_directories(combinations: Sequence[Combination]) -> None:
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


def _report(combinations: Sequence[Combination]) -> str:
    """Write `sweep.md` and `sweep.json`, so that they exist even if the sweep is killed. Return the text to print."""
    folder, text = combinations[0].folder.parent, table(combinations)
    keys = ("step", "last_loss", "seconds", "metrics")
    facts = [
        {"label": one.label, "values": one.values, "state": one.state, "folder": str(one.folder)}
        | {key: one.summary.get(key) for key in keys}
        for one in combinations
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.md").write_text(text, encoding="utf-8")
    (folder / "sweep.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    failed = "".join(f"failed: {one.label}\n" for one in combinations if one.state == "failed")
    return f"{text}{failed}{folder / 'sweep.md'}\n{folder / 'sweep.json'}\n"


def _written(chosen: dict[str, str]) -> list[str]:
    return [f"{key}={text}" for key, text in chosen.items()]


def _labels(values: Sequence[dict[str, str]]) -> list[str]:
    """Name the run directories: short keys if they are unambiguous, and only allowed characters."""
    last = {key: re.split(r"[./]", key)[-1] for key in values[0]}
    keys = Counter(last.values())
    short = {key: name if keys[name] == 1 else key.replace("/", ".") for key, name in last.items()}
    labels = [",".join(f"{short[key]}={_clean(text)}" for key, text in chosen.items()) for chosen in values]
    counts = Counter(labels)
    return [
        label if counts[label] == 1 and len(label) <= LONGEST_LABEL else f"{number:03d},{label}"[:LONGEST_LABEL]
        for number, label in enumerate(labels)
    ]


def _clean(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-") or "empty"
