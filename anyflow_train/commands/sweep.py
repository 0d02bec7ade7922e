"""`anyflow sweep`: train one run per combination, each in its own process and directory, and write a table."""

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
    """Train all combinations that are not finished. An interrupted run resumes from its checkpoint.

    Returns:
        0 if all combinations are finished, 1 if some failed, 130 if a signal stopped the sweep.

    Raises:
        UserErrors: errors of all combinations, before the first run starts.
    """
    if world_size() > 1:
        raise UserError("WORLD_SIZE", f"{world_size()}, but a sweep starts its own runs; start it without a launcher")
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
    """Starts runs one after another. A signal stops the current run cleanly and ends the sweep."""

    def __init__(self, config_dir: Path | None) -> None:
        self._options = ["--config-dir", str(config_dir)] if config_dir else []
        self._process: subprocess.Popen[bytes] | None = None
        self.stopped = False

    @contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """Forward SIGINT and SIGTERM to the current run, which finishes its step and saves."""
        before = {number: signal.signal(number, self._forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def finish(self, combination: Combination) -> RunOutcome:
        """Run a combination to its end, unless it is finished already."""
        finished = _outcome(combination, "waiting")
        if finished.state == "finished":
            print("already finished", flush=True)
            return finished
        command = [sys.executable, "-m", "anyflow_train", "train", *combination.overrides, *self._options]
        # In its own session, so that Ctrl-C reaches the run only once, through this process.
        self._process = subprocess.Popen(command, start_new_session=True)
        if self.stopped:  # a signal arrived while the run was being started
            self._process.terminate()
        code = self._process.wait()
        self._process = None
        outcome = _outcome(combination, "stopped" if code == 0 or self.stopped else "failed")
        if outcome.state == "failed":
            print(f"failed with exit code {code}; continuing with the next run", file=sys.stderr, flush=True)
        self.stopped |= outcome.state == "stopped"
        return outcome

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self.stopped = True
        if self._process is not None:
            self._process.send_signal(number)


def _check_directories(plan: SweepPlan) -> None:
    """Check that existing run directories have the same configs.

    Raises:
        UserErrors: a key changed that a resumed run cannot change.
    """
    # Imported here, because it imports torch, and errors of the configs should not wait for that.
    from anyflow_train.training.checkpoints.resume import check_unchanged
    from anyflow_train.training.checkpoints.run_directory import RunDirectory

    errors: list[UserError] = []
    for combination in plan.combinations:
        directory = RunDirectory(combination.folder)
        if not (directory.path / "config.json").exists():
            continue
        try:
            check_unchanged(directory.read_config(), combination.config, str(directory.path))
        except UserError as error:
            errors += [UserError(one.where, f"{one.problem} ({directory.path})") for one in error.each()]
    if errors:
        raise UserErrors(errors)


def _outcome(combination: Combination, otherwise: str) -> RunOutcome:
    """Read the outcome from the run directory. `otherwise` is the state of a run that is not finished."""
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
    """Write the current table, so that it exists even if the sweep is killed. Return the text to print."""
    table = markdown(outcomes, plan.combinations[0].config.evaluation.best_metric)
    paths = write(plan, outcomes, table)
    failed = [outcome.label for outcome in outcomes if outcome.state == "failed"]
    lines = [table, "".join(f"failed: {label}\n" for label in failed), *(f"{path}\n" for path in paths)]
    return "".join(lines)


def _exit_code(outcomes: Sequence[RunOutcome], stopped: bool) -> int:
    if any(outcome.state == "failed" for outcome in outcomes) and not stopped:
        return FAILURE
    return INTERRUPTED if stopped else SUCCESS
