"""`anyflow sweep sampler=tpe`: search values with Optuna instead of training every combination."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from anyflow_train.config.commands import SweepOptions
from anyflow_train.config.compose import compose
from anyflow_train.config.overrides import Setting, parse
from anyflow_train.errors import UserError, raise_all, requires_extra
from anyflow_train.files import json_lines, read_object
from anyflow_train.sweep.combinations import Combination, written
from anyflow_train.sweep.runner import Runner

STUDY = "sweep"
LOG = "optuna.log"
"""File in the sweep's folder that records the search, so that the same line goes on with it."""


class Search:
    """A search of the values of some keys, which make the best metric of a run's last validation small.

    Args:
        options: keys of the sweep, of which it reads `train` and `trials`.
        arguments: arguments of the runs. `key=a,b` searches among values, `key='interval(1e-4,1e-2)'` in a range, and
            `key='tag(log,interval(1e-4,1e-2))'` in a range on a logarithmic scale.

    Raises:
        UserErrors: errors of the arguments; no key is searched; or the extra `search` is not installed.
    """

    def __init__(self, options: SweepOptions, arguments: Sequence[str], config_dir: Path | None) -> None:
        with requires_extra("sampler", "search"):
            import optuna
            from optuna.storages.journal import JournalFileBackend
        self._optuna, self._config_dir, self._lock = optuna, config_dir, threading.Lock()
        settings, errors = parse([*options.train, *arguments])
        last = {setting.key: setting for setting in settings}
        self._space = {key: self._distribution(one) for key, one in last.items() if one.parsed.is_sweep_override()}
        if not self._space and not errors:
            errors.append(UserError("sampler", "tpe has nothing to search; write key=a,b or key='interval(a,b)'"))
        raise_all(errors)
        self._given = [f"{key}={setting.text}" for key, setting in last.items() if key not in self._space]
        first = {key: _middle(distribution) for key, distribution in self._space.items()}
        self.config = compose("train", [*self._given, *written(first)], config_dir)
        if not self.config.evaluation.every:
            raise UserError("evaluation.every", "is 0, but sampler=tpe compares runs by their validation; set it")
        self.folder = Path(self.config.out).expanduser() / self.config.name
        self.folder.mkdir(parents=True, exist_ok=True)
        backend = JournalFileBackend(str(self.folder / LOG))
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            study_name=STUDY,
            storage=optuna.storages.JournalStorage(backend),
            sampler=optuna.samplers.TPESampler(seed=0),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
            load_if_exists=True,
        )
        self._trials = options.trials

    def run(self, runner: Runner, report: Callable[[Sequence[Combination]], object]) -> list[Combination]:
        """Train runs until there are `trials` of them. Those of earlier starts count, and unfinished ones go on."""
        state = self._optuna.trial.TrialState
        combinations = [self._combination(one.number, one.params) for one in self._study.trials]
        for one, trial in zip(combinations, self._study.trials, strict=True):
            one.update("pruned" if trial.state == state.PRUNED else "waiting")
        unfinished = [t for t in self._study.trials if t.state == state.RUNNING]
        with ThreadPoolExecutor(runner.jobs) as pool:
            tasks = [pool.submit(self._one, t.number, combinations, runner, report) for t in unfinished]
            new = range(self._trials - len(combinations))
            tasks += [pool.submit(self._one, None, combinations, runner, report) for _ in new]
            for task in tasks:
                task.result()
        return combinations

    def best(self) -> str:
        """Describe the best run: its label, values and metric."""
        try:
            trial = self._study.best_trial
        except ValueError:
            return "no run has been validated"
        values = ", ".join(f"{key}={value}" for key, value in trial.params.items())
        return f"best: {label(trial.number)} with {values}: {self.config.evaluation.best_metric} {trial.value:.4g}"

    def _one(
        self,
        number: int | None,
        combinations: list[Combination],
        runner: Runner,
        report: Callable[[Sequence[Combination]], object],
    ) -> None:
        if runner.stopped:
            return
        optuna, state = self._optuna, self._optuna.trial.TrialState
        with self._lock:
            if number is None:
                trial = self._study.ask(self._space)
                one = self._combination(trial.number, trial.params)
                combinations.append(one)
            else:
                trial = optuna.trial.Trial(self._study, self._study.trials[number]._trial_id)
                one = combinations[number]
            print(f"== {one.label} {' '.join(written(one.values))}", flush=True)
        pruned, reported = False, set[int]()

        def hopeless() -> bool:
            nonlocal pruned
            with self._lock:
                for step, value in validations(one.folder, self.config.evaluation.best_metric).items():
                    if step not in reported:
                        trial.report(value, step)
                        reported.add(step)
                pruned = trial.should_prune()
            return pruned

        code, seconds = runner.call(["train", *one.overrides], one, stop=hopeless)
        one.cpu_seconds += seconds
        one.update("pruned" if pruned else "stopped" if code == 0 or runner.stopped else "failed")
        found = validations(one.folder, self.config.evaluation.best_metric)
        with self._lock:
            if one.state == "finished" and found:
                self._study.tell(trial, found[max(found)])
            elif one.state != "stopped":
                self._study.tell(trial, state=state.PRUNED if pruned else state.FAIL)
            report(combinations)
        runner.stopped |= one.state == "stopped"

    def _combination(self, number: int, params: Mapping[str, Any]) -> Combination:
        values = {key: str(value) for key, value in params.items()}
        config = compose("train", [*self._given, *written(values)], self._config_dir)
        config = config.model_copy(update={"out": str(self.folder), "name": label(number)})
        return Combination(label(number), values, self._given, config)

    def _distribution(self, setting: Setting) -> Any:
        found, kinds = setting.interval(), self._optuna.distributions
        if found is None:
            return kinds.CategoricalDistribution(setting.alternatives())
        low, high, log = found
        whole = isinstance(low, int) and isinstance(high, int)
        return (kinds.IntDistribution if whole else kinds.FloatDistribution)(low, high, log=log)


def label(number: int) -> str:
    """Name of a run's directory."""
    return f"trial-{number:04d}"


def validations(folder: Path, metric: str) -> dict[int, float]:
    """Read a metric of a run: step -> value. Values that are not finite are left out."""
    name = f"validation/{metric}"
    found = {row["step"]: row[name] for row in json_lines(folder / "metrics.jsonl") if name in row}
    if not found and (done := read_object(folder / "done.json")):
        found = {done["step"]: done.get("metrics", {}).get(metric, math.nan)}
    return {step: value for step, value in found.items() if math.isfinite(value)}


def _middle(distribution: Any) -> str:
    """Return a value of a distribution, to check the config before the search."""
    return str(distribution.choices[0] if hasattr(distribution, "choices") else distribution.low)
