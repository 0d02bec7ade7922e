"""`profile=true`: where the time of a step goes, part by part, and a trace of a few steps.

Parts are timed on the device's own clock, without the profiler, which slows a step down; the trace is of the steps
after those.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from anyflow_train.data.batch import Batch
from anyflow_train.flow.types import CausalFlowMap, Condition, FlowMap
from anyflow_train.objectives.types import Roles
from anyflow_train.training.engine import Outcome
from anyflow_train.training.processes.world import World
from anyflow_train.training.recipe import Recipe
from anyflow_train.training.updates import Trainable

# Steps after a start: for warming up (a compiled network meets its text lengths), for the table, and for the trace.
WARMED_UP, PROFILED, TRACED = 4, 4, 2
STEP = "step"


class Clock:
    """Adds up what parts take, on a device's own time line: a GPU is never waited for in a step."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self.running = False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside is a call of this part, if the clock is running."""
        if not self.running:
            yield
            return
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def spans(self) -> dict[str, list[float]]:
        """Seconds of every call, by part."""
        if self._gpu:
            torch.cuda.synchronize()
        found: dict[str, list[float]] = {}
        for name, start, end in self._spans:
            found.setdefault(name, []).append(start.elapsed_time(end) / 1000 if self._gpu else end - start)
        return found

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class TimedFlowMap:
    """A role's flow map, timed. Its calls with gradient are another part than those without."""

    name: str
    flow_map: FlowMap
    clock: Clock

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        with self.clock.part(f"{self.name}, {'forward' if torch.is_grad_enabled() else 'without gradient'}"):
            return self.flow_map(x, t, r, condition)

    def encode_context(self, x: Tensor, chunks: tuple[int, ...], condition: Condition) -> object:
        with self.clock.part(f"{self.name}, earlier chunks"):
            return cast(CausalFlowMap, self.flow_map).encode_context(x, chunks, condition)


class Timed:
    """An engine or its averages, timed; all else is theirs."""

    def __init__(self, role: str, inner: Any, clock: Clock) -> None:
        self._role, self._inner, self._clock = role, inner, clock

    def backward(self, loss: Tensor) -> None:
        with self._clock.part(f"{self._role}, backward"):
            self._inner.backward(loss)

    def step(self, learning_rate: float, watched: Tensor) -> Outcome:
        with self._clock.part(f"{self._role}, optimizer"):
            return self._inner.step(learning_rate, watched)

    def update(self, step: int) -> None:
        with self._clock.part(f"{self._role}, averages"):
            self._inner.update(step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Profile:
    """Of the first steps after a start; a run that ends before leaves what there is.

    Args:
        folder: where the trace goes, one file for each process.
        say: prints a line on the terminal, or in this process's log.
    """

    def __init__(self, folder: Path, world: World, say: Callable[[str], None]) -> None:
        self._file = folder / f"process_{world.rank}.json.gz"
        self._say, self._clock, self._steps = say, Clock(world.device), 0
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if world.device.type == "cuda" else [])]
        self._trace = profile(activities=activities)
        self._shown = self._tracing = False

    def timed(self, recipe: Recipe) -> Recipe:
        """The same recipe, whose parts are timed."""
        trainables = {role: self._timed(role, trainable) for role, trainable in recipe.trainables.items()}
        return replace(recipe, roles=self._roles(recipe.roles), trainables=trainables)

    def stream(self, batches: Iterable[Sequence[Batch]]) -> Iterator[Sequence[Batch]]:
        """The same micro-batches; a step lasts from one wait for them to the next."""
        source = iter(batches)
        while True:
            with self._clock.part(STEP):
                with self._clock.part("loading data"):
                    step = next(source, None)
                if step is None:
                    return
                yield step
            self._after_step()

    def _timed(self, role: str, trainable: Trainable) -> Trainable:
        clock, ema = self._clock, trainable.ema
        averages: Any = None if ema is None else Timed(role, ema, clock)
        return replace(trainable, engine=cast(Any, Timed(role, trainable.engine, clock)), ema=averages)

    def _roles(self, roles: Roles) -> Roles:
        def timed(name: str, flow_map: FlowMap | None) -> Any:
            return None if flow_map is None else TimedFlowMap(name, flow_map, self._clock)

        return Roles(
            timed("student", roles.student),
            timed("derivative", roles.derivative),
            timed("teacher", roles.teacher),
            timed("fake_score", roles.fake_score),
        )

    def _after_step(self) -> None:
        self._steps += 1
        done = self._steps - WARMED_UP
        self._clock.running = 0 <= done < PROFILED
        if done == PROFILED:
            self._show()
            self._trace.start()
            self._tracing = True
        if done == PROFILED + TRACED:
            self._write_trace()

    def close(self) -> None:
        """Leave what a run that ends early has."""
        if not self._shown:
            self._show()
        if self._tracing:
            self._write_trace()

    def _show(self) -> None:
        self._shown, spans = True, self._clock.spans()
        for line in table(spans) if STEP in spans else [f"no profile: it begins with step {WARMED_UP + 1} of a start"]:
            self._say(line)

    def _write_trace(self) -> None:
        self._tracing = False
        self._trace.stop()
        self._file.parent.mkdir(exist_ok=True)
        partial = self._file.with_name(f"partial_{self._file.name}")  # the ending stays: it asks for compression
        self._trace.export_chrome_trace(str(partial))
        partial.replace(self._file)
        self._say(f"a trace, for ui.perfetto.dev: {self._file}")


def table(spans: dict[str, list[float]]) -> list[str]:
    """Lines of a table: calls and seconds of every part in a step, and what is left."""
    steps = spans[STEP]
    whole, count = sum(steps), len(steps)
    parts = {name: (len(each), sum(each)) for name, each in spans.items() if name != STEP}
    rest = whole - sum(seconds for _, seconds in parts.values())
    lines = [f"{f'profile of {count} steps':<34}{'calls':>7}{'seconds':>12}{'share':>8}"]
    for name, (calls, seconds) in parts.items():
        lines.append(f"  {name:<32}{calls / count:>7g}{seconds / count:>12.4f}{seconds / whole:>8.1%}")
    lines.append(f"  {'draws, losses and all else':<32}{'':>7}{rest / count:>12.4f}{rest / whole:>8.1%}")
    lines.append(f"  {'a step':<32}{'':>7}{whole / count:>12.4f}{1:>8.1%}")
    return lines
