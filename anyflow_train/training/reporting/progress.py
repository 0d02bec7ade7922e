"""Show the progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from tqdm import tqdm

SHORT = {
    "gradient_norm": "grad",
    "learning_rate": "lr",
    "samples_per_second": "samples/s",
    "seconds_per_step": "s/step",
}
# Values with this in their name go to the trackers only; a line has no room for them.
HIDDEN = "/rollout_"


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the GPU if `device` is one, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # Linux counts KiB, macOS bytes


class StepProgress:
    """Shows the numbers of logged steps.

    Args:
        steps: steps of the whole run.
        done: steps done before this start.
    """

    def __init__(self, steps: int, done: int) -> None:
        self._steps = steps
        self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def advance(self) -> None:
        """Count one step on the bar."""
        with _surviving():
            self._bar.update()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers after `step` steps."""
        shown = {name: value for name, value in values.items() if HIDDEN not in name}
        text = "  ".join(f"{SHORT.get(name, name)} {_number(value)}" for name, value in shown.items())
        if not self._bar.disable:
            with _surviving():
                self._bar.set_postfix_str(text)
            return
        remaining = (self._steps - step) * values.get("seconds_per_step", 0.0)
        with _surviving():
            print(f"step {step}/{self._steps}  {text}  eta {tqdm.format_interval(remaining)}", flush=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        with _surviving():
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


@contextmanager
def _surviving() -> Iterator[None]:
    """Print inside the block. If that fails, drop further output: a reader that ended must not end the run."""
    try:
        yield
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                os.dup2(nowhere, stream.fileno())


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e-2 else f"{value:.4g}"
