"""`profile=true`: a table of the time that each part of a step takes, and a trace of a few steps.

The parts are timed with the device's clock and without torch's profiler, which slows a step down. The trace is recorded
in the steps after that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

from anyflow_train.data.batch import Batch
from anyflow_train.flow.types import CausalFlowMap, Condition, FlowMap
from anyflow_train.training.processes.world import World
from anyflow_train.training.recipe import Recipe
from anyflow_train.training.updates import Trainable

# Numbers of steps after a start: warm-up (compilation for all text lengths), steps in the table, steps in the trace.
WARMED_UP, PROFILED, TRACED = 4, 4, 2
STEP = "step"


class Watch(Protocol):
    """Observes every part of a step."""

    def part(self, name: str, samples: int = 0) -> Any:
        """Observe the block, or each call of the decorated function, as one call of a part.

        Args:
            samples: number of samples if the part is a flow map, else 0.
        """
        ...


class Clock:
    """Times parts with the device's clock. It does not synchronise with a GPU during a step."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self.running = False

    @contextmanager
    def part(self, name: str, samples: int = 0) -> Iterator[None]:
        """Time the block as one call of a part if the clock is running."""
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
class WatchedFlowMap:
    """An observed flow map of a role. Calls with and without gradient are different parts."""

    name: str
    flow_map: FlowMap
    watch: Watch

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        kind = "forward" if torch.is_grad_enabled() else "without gradient"
        with self.watch.part(f"{self.name}, {kind}", x.shape[0]):
            return self.flow_map(x, t, r, condition)

    def encode_context(self, x: Tensor, chunks: tuple[int, ...], condition: Condition) -> object:
        with self.watch.part(f"{self.name}, earlier chunks", x.shape[0]):
            return cast(CausalFlowMap, self.flow_map).encode_context(x, chunks, condition)


class Watched:
    """An object with observed methods. All other attributes are forwarded.

    Args:
        parts: method -> name of its part.
    """

    def __init__(self, inner: Any, watch: Watch, **parts: str) -> None:
        self._inner = inner
        vars(self).update({name: watch.part(part)(getattr(inner, name)) for name, part in parts.items()})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def watched(recipe: Recipe, watch: Watch) -> Recipe:
    """Return the recipe with flow maps, engines and averages that are observed by `watch`."""

    def trainable(role: str, inner: Trainable) -> Trainable:
        engine: Any = Watched(inner.engine, watch, backward=f"{role}, backward", step=f"{role}, optimizer")
        ema: Any = inner.ema and Watched(inner.ema, watch, update=f"{role}, averages")
        return replace(inner, engine=engine, ema=ema)

    roles = recipe.roles.wrapped(lambda name, inner: WatchedFlowMap(name, inner, watch))
    trainables = {role: trainable(role, inner) for role, inner in recipe.trainables.items()}
    return replace(recipe, roles=roles, trainables=trainables)


class Profile:
    """Profiles the first steps after a start. A run that ends earlier shows the steps that it has.

    Args:
        folder: folder of the traces, one file per process.
        say: prints a line to the terminal or to this process's log.
    """

    def __init__(self, folder: Path, world: World, say: Callable[[str], None]) -> None:
        self._file = folder / f"process_{world.rank}.json.gz"
        self._say, self._clock, self._steps = say, Clock(world.device), 0
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if world.device.type == "cuda" else [])]
        steps = schedule(skip_first=WARMED_UP + PROFILED, wait=0, warmup=1, active=TRACED, repeat=1)
        self._trace = profile(activities=activities, schedule=steps, on_trace_ready=self._write_trace)
        self._trace.start()

    def timed(self, recipe: Recipe) -> Recipe:
        """Return the recipe with timed parts."""
        return watched(recipe, self._clock)

    def stream(self, batches: Iterable[Sequence[Batch]]) -> Iterator[Sequence[Batch]]:
        """Yield the micro-batches of each step. A step is timed from one request for them to the next."""
        source = iter(batches)
        while True:
            with self._clock.part(STEP):
                with self._clock.part("loading data"):
                    step = next(source, None)
                if step is None:
                    return
                yield step
            self._after_step()

    def _after_step(self) -> None:
        self._steps += 1
        self._clock.running = WARMED_UP <= self._steps < WARMED_UP + PROFILED
        if self._steps == WARMED_UP + PROFILED:
            self._show()
        self._trace.step()

    def close(self) -> None:
        """Show the table and write the trace if the run ended before they were complete."""
        if self._steps < WARMED_UP + PROFILED:
            self._show()
        self._trace.stop()

    def _show(self) -> None:
        spans = self._clock.spans()
        none = f"no profile: it begins with step {WARMED_UP + 1} after a start"
        for line in table(spans) if STEP in spans else [none]:
            self._say(line)

    def _write_trace(self, trace: profile) -> None:
        self._file.parent.mkdir(exist_ok=True)
        partial = self._file.with_name(f"partial_{self._file.name}")  # torch compresses the file because of its suffix
        trace.export_chrome_trace(str(partial))
        partial.replace(self._file)
        self._say(f"trace, to open in ui.perfetto.dev: {self._file}")


def table(spans: dict[str, list[float]]) -> list[str]:
    """Lines of a table: calls and seconds of every part per step, and the rest of the step."""
    steps = spans[STEP]
    whole, count = sum(steps), len(steps)
    parts = {name: (len(each), sum(each)) for name, each in spans.items() if name != STEP}
    rest = whole - sum(seconds for _, seconds in parts.values())
    lines = [f"{f'profile of {count} steps':<34}{'calls':>7}{'seconds':>12}{'share':>8}"]
    for name, (calls, seconds) in parts.items():
        lines.append(f"  {name:<32}{calls / count:>7g}{seconds / count:>12.4f}{seconds / whole:>8.1%}")
    lines.append(f"  {'draws, losses and the rest':<32}{'':>7}{rest / count:>12.4f}{rest / whole:>8.1%}")
    lines.append(f"  {'a step':<32}{'':>7}{whole / count:>12.4f}{1:>8.1%}")
    return lines
