"""`anyflow sweep`: one run per combination, each in a process and a directory of its own, and a table at the end."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from anyflow_train.commands.sweep_plan import Combination, SweepPlan, make_plan
from anyflow_train.commands.sweep_table import RunOutcome, markdown, write
from anyflow_train.config.derived import world_size
from anyflow_train.errors import UserError, UserErrors

SUCCESS, FAILURE, INTERRUPTED = 0, 1, 130


def run(overrides: Sequence[str], config_dir: Path | None) -> int:
    """Run what is not finished yet; a run that was cut off goes on from its checkpoint.

    Returns:
        0 when all combinations are finished, 1 when some failed, 130 when the sweep was asked to stop.

    Raises:
        UserErrors: of any combination, before the first one starts.
    """
    if world_size() > 1:
        raise UserError("WORLD_SIZE", f"{world_size()}: a sweep starts its runs itself; start it without a launcher")
    plan = make_plan(overrides, config_dir)
    _check_directories(plan)
    runner = Runner(config_dir)
    outcomes = [_outcome(combination, "waiting") for combination in plan.combinations]
    with runner.forwarding_signals():
        for number, combination in enumerate(plan.combinations):
            if runner.stopped:
                break
            print(f"== {number + 1}/{len(plan.combinations)} {combination.label}", flush=True)
            outcomes[number] = runner.finish(combination)
            _report(plan, outcomes)
    print(_report(plan, outcomes), end="")
    return _exit_code(outcomes, runner.stopped)


class Runner:
    """Starts runs one after another; a signal ends the present one in order, and with it the sweep."""

    def __init__(self, config_dir: Path | None) -> None:
        self._options = ["--config-dir", str(config_dir)] if config_dir else []
        self._process: subprocess.Popen[bytes] | None = None
        self.stopped = False

    @contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM go to the present run, which finishes its step and saves."""
        before = {number: signal.signal(number, self._forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def finish(self, combination: Combination) -> RunOutcome:
        """Run a combination to its end, unless it is there already."""
        finished = _outcome(combination, "waiting")
        if finished.state == "finished":
            print("finished before", flush=True)
            return finished
        command = [sys.executable, "-m", "anyflow_train", "train", *combination.overrides, *self._options]
        # A session of its own: the terminal's Ctrl-C then reaches the run once, through this process.
        self._process = subprocess.Popen(command, start_new_session=True)
        if self.stopped:  # asked to stop while it was being started
            self._process.terminate()
        code = self._process.wait()
        self._process = None
        outcome = _outcome(combination, "stopped" if code == 0 or self.stopped else "failed")
        if outcome.state == "failed":
            print(f"failed with exit code {code}; going on", file=sys.stderr, flush=True)
        self.stopped |= outcome.state == "stopped"
        return outcome

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self.stopped = True
        if self._process is not None:
            self._process.send_signal(number)


def _check_directories(plan: SweepPlan) -> None:
    """Directories of an earlier sweep must hold runs of the same configs.

    Raises:
        UserErrors: a key changed that a run cannot change on the way.
    """
    # Imported here, because it imports torch, and errors of the configs are to come without that.
    from anyflow_train.training.checkpoints.resume import check_unchanged
    from anyflow_train.training.checkpoints.run_directory import RunDirectory

    errors: list[UserError] = []
    for combination in plan.combinations:
        directory = RunDirectory(combination.folder)
        if not (directory.path / "config.json").exists():
            continue
        try:
            check_unchanged(directory.read_config(), combination.config, str(directory.path))
        except UserErrors as several:
            errors += [UserError(error.where, f"{error.problem} ({directory.path})") for error in several.errors]
        except UserError as error:
            errors.append(UserError(error.where, f"{error.problem} ({directory.path})"))
    if errors:
        raise UserErrors(errors)


def _outcome(combination: Combination, otherwise: str) -> RunOutcome:
    """What the run directory says; `otherwise` is its state unless it is finished."""
    from anyflow_train.training.checkpoints.run_directory import RunDirectory

    done = RunDirectory(combination.folder).read_done()
    common = (combination.label, combination.values)
    if done is None or done["step"] < combination.config.steps:
        return RunOutcome(*common, otherwise, str(combination.folder))
    return RunOutcome(
        *common,
        "finished",
        str(combination.folder),
        step=done["step"],
        last_loss=done["last_loss"],
        seconds=done["seconds"],
        metrics=done["metrics"],
    )


def _report(plan: SweepPlan, outcomes: list[RunOutcome]) -> str:
    """Write the table as it stands, so that it is there even if the sweep is killed; and return what to print."""
    table = markdown(outcomes, plan.combinations[0].config.evaluation.best_metric)
    paths = write(plan, outcomes, table)
    failed = [outcome.label for outcome in outcomes if outcome.state == "failed"]
    lines = [table, "".join(f"failed: {label}\n" for label in failed), *(f"{path}\n" for path in paths)]
    return "".join(lines)


def _exit_code(outcomes: Sequence[RunOutcome], stopped: bool) -> int:
    if any(outcome.state == "failed" for outcome in outcomes) and not stopped:
        return FAILURE
    return INTERRUPTED if stopped else SUCCESS
