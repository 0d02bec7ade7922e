"""The training loop: one trainer for every stage, because a run is a list of updates."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from statistics import fmean

import torch

from anyflow_train.config.run import RunConfig
from anyflow_train.config.schedule import mean_over
from anyflow_train.data.batch import Batch
from anyflow_train.errors import UserError
from anyflow_train.flow.draw import Draw
from anyflow_train.training.checkpoints.run_directory import RunDirectory
from anyflow_train.training.checkpoints.saving import Saver
from anyflow_train.training.checkpoints.state import Best, TrainState
from anyflow_train.training.checkpoints.tensor_handle import Entry
from anyflow_train.training.engine import adam_steps
from anyflow_train.training.gpus import known_gpu, utilisation
from anyflow_train.training.processes.signals import StopRequest, WaitInterrupted
from anyflow_train.training.recipe import Recipe
from anyflow_train.training.reporting.progress import StepProgress, peak_memory_gib
from anyflow_train.training.reporting.tracking import Trackers
from anyflow_train.training.schedule import learning_rate
from anyflow_train.training.updates import make_update
from anyflow_train.training.validation import Validator


@dataclass
class Trainer:
    """A run in progress.

    Attributes:
        state: steps done, and everything else that resume needs in addition to the tensors.
        validator: evaluates the student; None for a run without validation.
        stop: whether the run has received a stop signal.
        work: operations of one step of each stage, summed over all processes; None leaves `mfu` out of the log.
    """

    config: RunConfig
    directory: RunDirectory
    recipe: Recipe
    state: TrainState
    progress: StepProgress
    trackers: Trackers
    validator: Validator | None
    stop: StopRequest
    work: Sequence[float] | None = None

    def __post_init__(self) -> None:
        self._step_seconds: list[float] = []  # without saving and validating
        self._samples = 0
        self._activity = self.recipe.world.activity
        device = self.recipe.world.device
        self._gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._window: list[dict[str, float]] = []
        self._logged = self.state.step
        self._saved = self.state.step
        self._saver = Saver(self.config, self.directory.checkpoints, self.recipe.world, self.progress.say)
        self._loss = self.state.last_loss
        self._seconds_before = self.state.seconds - time.monotonic()

    def train(self, stream: Iterable[Sequence[Batch]]) -> None:
        """Run the remaining steps on this process's micro-batches, or fewer after a stop signal."""
        with closing(self._saver):
            self._saver.check_room(self._groups())
            self._run(iter(stream))

    def _run(self, steps: Iterator[Sequence[Batch]]) -> None:
        self._validate_if_due()
        while self.state.step < self.config.steps and not self._should_stop():
            start = time.monotonic()
            self._activity.begin("loading data", self.state.step)
            batches = self._load(steps)
            if batches is None:
                break
            self._activity.begin("training", self.state.step)
            self._step(batches)
            self._step_seconds.append(time.monotonic() - start)
            self._log_if_due()
            if self._due(self.config.checkpoint.every):
                self._save()  # before the validation, so that nothing is lost if that fails
            self._validate_if_due()
        self._save()
        self._saver.wait()
        self._activity.begin_untimed("ending")
        if self.state.step < self.config.steps:
            self.progress.say(f"stopped after step {self.state.step} of {self.config.steps}; start again to resume")
        else:
            self._finish()

    def _load(self, steps: Iterator[Sequence[Batch]]) -> Sequence[Batch] | None:
        """Load a step's batches. Returns None if a stop signal interrupts a single process while it waits for them."""
        if self.recipe.world.size > 1:
            return next(steps)
        with suppress(WaitInterrupted), self.stop.interrupting():
            return next(steps)
        return None

    def _step(self, batches: Sequence[Batch]) -> None:
        config, step, device = self.config, self.state.step, self.recipe.world.device
        batches = [batch.to(device) for batch in batches]
        scopes = [f"turn {batch.turn}: " if batch.turn else "" for batch in batches]
        pairs = zip(batches, scopes, strict=True)
        draws = [Draw(config.seed, step, batch.positions, device, scope) for batch, scope in pairs]
        values, nonfinite_samples = {"learning_rate": learning_rate(step, config.steps, config.optimizer)}, ()
        for update in self.recipe.updates:
            if not update.due(step):
                continue
            trainable = self.recipe.trainables[update.role]
            rate = learning_rate(step, config.steps, trainable.optimizer)
            prefix = "" if update.role == "student" else f"{update.role}/"
            report = make_update(update, trainable, self.recipe.roles, batches, draws, rate, prefix)
            if report.applied and trainable.ema is not None:
                trainable.ema.update(step)
            values |= report.values
            nonfinite_samples += report.nonfinite_samples
        size = sum(len(batch.positions) for batch in batches) * self.recipe.world.data_size
        self._advance(size, values, nonfinite_samples)

    def _advance(self, size: int, values: dict[str, float], nonfinite_samples: tuple[str, ...]) -> None:
        """Count the step. A skipped step also consumes its data, but its values are left out of the logged means."""
        state = self.state
        self._samples += size
        self.state = dataclasses.replace(
            state,
            step=state.step + 1,
            samples_seen=state.samples_seen + size,
            data_position=state.data_position + size,
            skipped=state.skipped + bool(nonfinite_samples),
            skipped_in_row=state.skipped_in_row + 1 if nonfinite_samples else 0,
        )
        self.progress.advance()
        if not nonfinite_samples:
            self._window.append(values)
            return
        shown, more = nonfinite_samples[:8], len(nonfinite_samples[8:])
        names = ", ".join(shown) + (f" and {more} more" if more else "")
        problem = f"step {state.step} has a loss or gradient that is not finite; samples: {names}"
        if self.state.skipped_in_row >= self.config.max_nonfinite_steps:
            with self.recipe.world.together():
                raise UserError("max_nonfinite_steps", f"{self.state.skipped_in_row} such steps in a row: {problem}")
        self.progress.say(f"warning: {problem}; skipped")

    def _log_if_due(self) -> None:
        """Show and record the means since the last logged step; the values of a single step would be noisy."""
        if not (self._due(self.config.log_every) and self._window):
            return
        names = dict.fromkeys(name for row in self._window for name in row)
        means = {name: fmean(row[name] for row in self._window if name in row) for name in names}
        seconds = fmean(self._step_seconds)
        means["samples_per_second"] = self._samples / sum(self._step_seconds)
        means["seconds_per_step"] = seconds
        if self._gpu is not None and self.work is not None:
            work = mean_over(self.config, self.work, range(self._logged, self.state.step))
            means["mfu"] = utilisation(work, self._gpu, self.recipe.world.size, seconds)
        means["memory_gib"] = peak_memory_gib(self.recipe.world.device)
        means["skipped"] = self.state.skipped
        self._loss = means.get("loss", self._loss)
        self._window.clear()
        self._step_seconds.clear()
        self._samples = 0
        self.progress.show(self.state.step, means)
        self.trackers.log(self.state.step, means)

    def _validate_if_due(self) -> None:
        """Validate the averaged student. An interrupted validation is repeated directly after the next start."""
        done = self.state.validated == self.state.step
        if self.validator is None or done or not self._due(self.config.evaluation.every):
            return
        folder = self.directory.validation(self.state.step)
        with self._activity.untimed("validating"), self.progress.phase("validating") as show:
            validation = self.validator(self.recipe.averaged, folder, self._should_stop, show)
        if validation is None:
            return
        metrics = validation.metrics
        self.state = dataclasses.replace(self.state, validated=self.state.step, metrics=metrics)
        self.progress.validated(self.state.step, validation)
        tracked = {f"validation/{name}": value for name, value in (metrics | validation.intervals).items()}
        self.trackers.log(self.state.step, tracked, validation.videos)
        best, metric = self.state.best, self.config.evaluation.best_metric
        value = metrics.get(metric, math.inf)
        better = math.isfinite(value) and (best is None or value < best.value)
        if better:
            self.state = dataclasses.replace(self.state, best=Best(self.state.step, metric, value))
        if self._saved == self.state.step:
            self._saver.update(self.state)
        elif better:
            self._save()

    def _save(self) -> None:
        """Begin a checkpoint of this step, unless it has one already."""
        if self._saved == self.state.step:
            return
        self.state = dataclasses.replace(self.state, seconds=self._seconds(), last_loss=self._loss)
        roles = self.recipe.trainables
        counts = {role: adam_steps(trainable.engine.optimizer) for role, trainable in roles.items()}
        with self.progress.phase("saving"):
            self._saver.save(self.state, counts, self._groups())
        self._saved = self.state.step

    def _groups(self) -> dict[str, dict[str, Entry]]:
        """The tensors of a checkpoint."""
        roles = self.recipe.trainables
        return {group: dict(entries) for role in roles for group, entries in self.recipe.groups(role).items()}

    def _finish(self) -> None:
        summary = {
            "step": self.state.step,
            "last_loss": self._loss,
            "seconds": self._seconds(),
            "skipped": self.state.skipped,
            "metrics": self.state.metrics or {},
        }
        self.recipe.world.on_main(lambda: self.directory.write_done(summary))
        self.progress.say(f"finished {self.state.step} steps in {summary['seconds']:.0f} s: {self.directory.path}")

    def _should_stop(self) -> bool:
        """Whether any process received a stop signal or could not save. All processes stop after the same step."""
        return self.recipe.world.any(self.stop.signal is not None or self._saver.failed)

    def _due(self, every: int) -> bool:
        step = self.state.step
        return step > 0 and (step % every == 0 or step == self.config.steps)

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic()
