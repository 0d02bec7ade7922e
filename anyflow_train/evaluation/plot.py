"""Plots of an evaluation: quality against the number of network calls or the chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from anyflow_train.evaluation.intervals import Estimate
from anyflow_train.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart. The first colour is reserved for the teacher.
COLOURS = ("#5f5f5f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("s", "o", "^", "D", "v", "P", "X")


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
        scale: scale of the vertical axis.
        curves: one curve per model.
        across: quantity on the horizontal axis.
    """

    title: str
    scale: Literal["log", "linear"]
    curves: tuple[Curve, ...]
    across: Literal["network calls", "chunk"] = "network calls"


def write_plot(path: Path, panels: Sequence[Panel]) -> None:
    """Draw panels side by side into a PNG, with one legend."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        draw(panels).savefig(file, format="png")


def draw(panels: Sequence[Panel]) -> Figure:
    """Draw panels side by side, with one legend."""
    figure = Figure(figsize=(3.9 * len(panels), 3.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = min(len(labels), 2 * len(panels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    floor = _floor(panel) if panel.scale == "log" else None
    for number, curve in enumerate(panel.curves):
        _draw_curve(axes, curve, number, floor)
    steps = sorted({step for curve in panel.curves for step in curve.steps})
    if panel.across == "network calls":
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(steps))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(steps, [str(step) for step in steps])
    if floor is not None:
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor * 0.8)
    axes.set_xlabel(panel.across, fontsize=9)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.tick_params(labelsize=8, length=3)
    axes.grid(True, axis="y", which="major", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curve(axes: Axes, curve: Curve, number: int, floor: float | None) -> None:
    bound = float("-inf") if floor is None else floor
    values, lows, highs = (
        [max(bound, getattr(estimate, end)) for estimate in curve.estimates] for end in ("value", "low", "high")
    )
    students = len(COLOURS) - 1
    place = (number - 1) % students + 1 if number else 0
    colour = COLOURS[place]
    axes.fill_between(curve.steps, lows, highs, color=colour, alpha=0.16, linewidth=0)
    axes.plot(
        curve.steps,
        values,
        color=colour,
        marker=MARKERS[place],
        linestyle="-" if number <= students else "--",
        markersize=4.5,
        linewidth=1.6,
        label=curve.label,
    )


def _floor(panel: Panel) -> float:
    """Return the lower limit of a log axis: it includes positive values, except those near zero only by chance."""
    estimates = [estimate for curve in panel.curves for estimate in curve.estimates]
    highs = [estimate.high for estimate in estimates if estimate.high > 0]
    values = [estimate.value for estimate in estimates if estimate.value > 0]
    return max(min(highs, default=1e-3) / 10, min(values, default=0.0))
