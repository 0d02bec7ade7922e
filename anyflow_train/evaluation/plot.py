"""Plots of an evaluation: quality against the number of network calls or the chunk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from anyflow_train.evaluation.intervals import Estimate
from anyflow_train.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart. The first colour is reserved for the teacher.
COLOURS = ("#5f5f5f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("s", "o", "^", "D", "v", "P", "X")
REAL = "#1a7f37"
TEXT_SIZE, TICK_SIZE = 11, 10  # points


@dataclass(frozen=True)
class Curve:
    """One model: its label, and an estimate for each number of calls or for each chunk."""

    label: str
    steps: tuple[int, ...]
    estimates: tuple[Estimate, ...]


@dataclass(frozen=True)
class Panel:
    """One measure of all models. On a log scale, values of zero or less are drawn at the lower edge.

    Attributes:
        title: name of the measure.
        scale: scale of the vertical axis; `share` is a linear one from 0 to 1.
        curves: one curve per model.
        across: quantity on the horizontal axis.
        better: which values are better.
        real: range in which real clips are; its value is drawn as a line. None leaves it out.
    """

    title: str
    scale: Literal["log", "share"]
    curves: tuple[Curve, ...]
    across: Literal["network calls", "chunk"] = "network calls"
    better: Literal["lower", "higher"] = "lower"
    real: Estimate | None = None


def write_plot(path: Path, panels: Sequence[Panel]) -> None:
    """Draw panels side by side into a PNG, with one legend."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        draw(panels).savefig(file, format="png")


def draw(panels: Sequence[Panel]) -> Figure:
    """Draw panels side by side, with one legend. The background is opaque, for slides and pages in dark mode."""
    figure = Figure(figsize=(4.9 * len(panels), 4.2), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = min(len(labels), 2 * len(panels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=TEXT_SIZE)
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    low, high = _log_limits(panel) if panel.scale == "log" else (0.0, 1.03)
    for number, curve in enumerate(panel.curves):
        _draw_curve(axes, curve, number, low)
    if panel.real is not None:
        axes.axhspan(max(low, panel.real.low), panel.real.high, color=REAL, alpha=0.1, linewidth=0)
        axes.axhline(panel.real.value, color=REAL, linestyle=":", linewidth=1.8, label="real clips against real clips")
    steps = sorted({step for curve in panel.curves for step in curve.steps})
    if panel.across == "network calls":
        axes.set_xscale("log", base=2)
        steps = [step for step, after in zip(steps, [*steps[1:], math.inf], strict=True) if after > 1.3 * step]
    axes.set_xticks(steps, [str(step) for step in steps])
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    if panel.scale == "log":
        axes.set_yscale("log")
        ticks = _round_numbers(low, high)
        ticks = ticks if len(ticks) < 10 else [tick for tick in ticks if f"{tick:e}".startswith("1")]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(low, high)
    axes.set_xlabel(panel.across, fontsize=TEXT_SIZE)
    axes.set_title(f"{panel.title}\n{panel.better} is better", fontsize=TEXT_SIZE, loc="left")
    axes.tick_params(labelsize=TICK_SIZE, length=3)
    axes.grid(True, axis="y", which="major", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curve(axes: Axes, curve: Curve, number: int, bound: float) -> None:
    values, lows, highs = (
        [max(bound, getattr(estimate, end)) for estimate in curve.estimates] for end in ("value", "low", "high")
    )
    students = len(COLOURS) - 1
    place = (number - 1) % students + 1 if number else 0
    colour = COLOURS[place]
    axes.fill_between(curve.steps, lows, highs, color=colour, alpha=0.18, linewidth=0)
    line = ("-" if number <= students else "--") + MARKERS[place]
    axes.plot(curve.steps, values, line, color=colour, markersize=6, linewidth=2, label=curve.label, clip_on=False)


def _log_limits(panel: Panel) -> tuple[float, float]:
    """Choose round limits of a log axis: all positive values, except those that are near zero only by chance."""
    estimates = [estimate for curve in panel.curves for estimate in curve.estimates]
    estimates += [panel.real] if panel.real else []
    highs = [estimate.high for estimate in estimates if estimate.high > 0] or [1.0]
    values = [estimate.value for estimate in estimates if estimate.value > 0]
    low = max(min(highs) / 5, min(values, default=0.0))
    around = _round_numbers(low / 10, 10 * max(highs))
    return max(tick for tick in around if tick < low), min(tick for tick in around if tick >= max(highs))


def _round_numbers(low: float, high: float) -> list[float]:
    """List 1, 2 and 5 times powers of ten in a range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for digit in (1, 2, 5) if low <= (tick := float(f"{digit}e{power}")) <= high]
