"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping

import torch
from tqdm import tqdm

SHORT = {
    "gradient_norm": "grad",
    "learning_rate": "lr",
    "samples_per_second": "samples/s",
    "seconds_per_step": "s/step",
}
# For the trackers: too much for a line.
HIDDEN = "/rollout_"


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far: the GPU's for a GPU, the process's otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # Linux counts KiB, macOS bytes


class Pace:
    """Time per training step, without the time spent on saving and validating."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._steps = 0
        self._since = time.monotonic()

    def begin(self) -> None:
        """The wait for the next step's data begins."""
        self._since = time.monotonic()

    def end(self) -> None:
        """The step is done."""
        self._seconds += time.monotonic() - self._since
        self._steps += 1

    def seconds_per_step(self) -> float:
        """Mean since the last call."""
        mean = self._seconds / max(self._steps, 1)
        self._seconds, self._steps = 0.0, 0
        return mean


class StepProgress:
    """Shows the numbers of logged steps.

    Args:
        steps: of the whole run.
        done: steps done before this start.
    """

    def __init__(self, steps: int, done: int) -> None:
        self._steps = steps
        self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers after `step` steps."""
        shown = {name: value for name, value in values.items() if HIDDEN not in name}
        text = "  ".join(f"{SHORT.get(name, name)} {_number(value)}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        remaining = (self._steps - step) * values.get("seconds_per_step", 0.0)
        print(f"step {step}/{self._steps}  {text}  eta {tqdm.format_interval(remaining)}", flush=True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e-2 else f"{value:.4g}"
