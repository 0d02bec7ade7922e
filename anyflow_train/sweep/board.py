"""Comparison of a sweep's variants: one table and one plot, over all seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from anyflow_train.evaluation.intervals import Estimate
from anyflow_train.evaluation.plot import Curve, Panel, write_plot
from anyflow_train.evaluation.report import TEACHER
from anyflow_train.files import replace_file
from anyflow_train.sweep.combinations import Combination
from anyflow_train.text import markdown_table

DISTANCE, ERROR, ACCURACY = "energy distance", "error to fine ODE", "accuracy"
NOTE = """Mean over {seeds}. An interval reaches from the lowest to the highest end of the seeds' 95 % intervals.
Energy distance to {reference}; 95 % of sets of as many real ones are below {floor:.3f}. The error to the fine ODE is
the root mean square distance from the teacher's fine solution from the same noise."""


def write_board(folder: Path, combinations: Sequence[Combination], report: Mapping[str, Any]) -> str:
    """Write `board.md` and `board.png` into the sweep's folder. Returns the text of `board.md`.

    Args:
        combinations: finished runs, all of them in the report.
        report: content of `report.json`.
    """
    cells = {(cell["model"], cell["steps"]): _measures(cell) for cell in report["cells"]}
    calls = sorted(report["config"]["calls"])
    groups: dict[str, list[Combination]] = {}
    for one in combinations:
        groups.setdefault(one.group, []).append(one)
    curves = {TEACHER: {n: cells[TEACHER, n] for n in calls}}
    for name, members in groups.items():
        curves[name] = {n: _over_seeds([cells[one.label, n] for one in members]) for n in calls}
    names = [name for name in (DISTANCE, ERROR, ACCURACY) if name in curves[TEACHER][calls[0]]]
    rows = [["variant", "steps", "CPU time", "calls", *names]]
    for name, by_calls in curves.items():
        members = groups.get(name, [])
        cost = [str(members[0].config.steps), f"{fmean(one.cpu_seconds for one in members):.0f} s"] if members else []
        for n, measures in by_calls.items():
            shown = [measures[key].as_distance() if key == DISTANCE else str(measures[key]) for key in names]
            rows.append([name, *(cost or ["", ""]), str(n), *shown])
    seeds = max(map(len, groups.values()))
    note = NOTE.format(
        seeds=f"{seeds} seeds" if seeds > 1 else "one seed",
        reference="real clips" if report["config"]["reference"] == "data" else "the guided teacher's samples",
        floor=report["real"]["energy_floor"],
    )
    text = "\n".join([*markdown_table(rows), "", note]) + "\n"
    replace_file(folder / "board.md", text.encode())
    write_plot(folder / "board.png", _panels(curves, names))
    return f"{text}\n{folder / 'board.md'}\n{folder / 'board.png'}"


def _panels(curves: Mapping[str, Mapping[int, Mapping[str, Estimate]]], names: Sequence[str]) -> list[Panel]:
    def drawn(name: str) -> tuple[Curve, ...]:
        return tuple(
            Curve(label, tuple(by_calls), tuple(measures[name] for measures in by_calls.values()))
            for label, by_calls in curves.items()
        )

    panels = [Panel(name, "log", drawn(name)) for name in (DISTANCE, ERROR)]
    return panels + [Panel(name, "share", drawn(name), better="higher") for name in names if name == ACCURACY]


def _measures(cell: Mapping[str, Any]) -> dict[str, Estimate]:
    found = {DISTANCE: Estimate(**cell["energy_distance"]), ERROR: Estimate(**cell["trajectory_error"])}
    seen = cell["recognition"]
    return found | ({ACCURACY: Estimate(**seen["accuracy"])} if seen else {})


def _over_seeds(of_seeds: Sequence[Mapping[str, Estimate]]) -> dict[str, Estimate]:
    """Average over runs that differ by the seed; the interval holds those of all seeds."""

    found = {}
    for name in of_seeds[0]:
        seeds = [measures[name] for measures in of_seeds]
        value, low = fmean(one.value for one in seeds), min(one.low for one in seeds)
        found[name] = Estimate(value, low, max(one.high for one in seeds))
    return found
