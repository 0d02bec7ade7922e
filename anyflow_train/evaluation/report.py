"""The files of an evaluation: `report.json`, a table and the plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anyflow_train import __version__
from anyflow_train.config.commands import EvaluateConfig
from anyflow_train.evaluation.by_chunk import ChunkCell, write_chunk_plot
from anyflow_train.evaluation.intervals import Estimate
from anyflow_train.evaluation.measure import ResultRow
from anyflow_train.evaluation.nearest import Nearest, TrainingSet
from anyflow_train.evaluation.plot import Curve, Panel, write_plot
from anyflow_train.files import atomic_file, write_json
from anyflow_train.text import markdown_table

TEACHER = "teacher"


@dataclass(frozen=True)
class EvaluationReport:
    """Result of an evaluation.

    Attributes:
        config: config of the evaluation.
        cells: rows of the teacher, then of each student, by number of calls; the teacher's fine solution is last.
        seconds: duration of the evaluation.
        training: the training clips that samples were compared with; None if `training_shards` is not set.
        chunks: results for each chunk; empty if no model is causal.
    """

    config: EvaluateConfig
    cells: tuple[ResultRow, ...]
    seconds: float
    training: TrainingSet | None = None
    chunks: tuple[ChunkCell, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return numbers and intervals by name; values that do not apply are None."""
        config = self.config.model_dump(mode="json")
        cells = [asdict(cell) for cell in self.cells]
        return {"package": "anyflow_train", "version": __version__, "seconds": self.seconds, "config": config} | {
            "interval": "95 %",
            "training": None if self.training is None else asdict(self.training),
            "cells": cells,
            "chunks": [asdict(cell) for cell in self.chunks],
        }


def write_report(folder: Path, report: EvaluationReport) -> str:
    """Write `report.json`, `report.md`, `quality.png` and, for causal models, `chunks.png`. Returns the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    table = "\n".join(table_lines(report))
    if report.chunks:
        table += "\n\n" + "\n".join(chunk_lines(report.chunks))
        write_chunk_plot(folder / "chunks.png", report.chunks)
    write_json(folder / "report.json", report.to_json())
    with atomic_file(folder / "report.md") as file:
        file.write(f"{table}\n\n{_caption(report)}\n".encode())
    write_plot(folder / "quality.png", panels(report))
    return table


def table_lines(report: EvaluationReport) -> list[str]:
    """Make the lines of a Markdown table with one row for each model and number of calls."""
    oracle = any(cell.recognition for cell in report.cells)
    head = ["model", "calls", "shift", "energy distance", "of the teacher's", "sliced Wasserstein", "error to fine ODE"]
    sharp = any(cell.recognition and cell.recognition.sharpness for cell in report.cells)
    head += ["class accuracy", "purity"] * oracle + ["sharpness"] * sharp
    head += ["to nearest training clip", "1 %", "minimum"] * bool(report.training)
    rows = [head, *(_row(cell, oracle, sharp) for cell in report.cells)]
    if report.training:
        near = _nearest(report.training.held_out)
        rows.append(["held-out clips", *[""] * (len(head) - 1 - len(near)), *near])
    return markdown_table(rows)


def chunk_lines(chunks: Sequence[ChunkCell]) -> list[str]:
    """Make the lines of a Markdown table of energy distances, with one column per chunk."""
    count = max(cell.chunk for cell in chunks)
    rows = [["model", "calls", *(f"chunk {number}" for number in range(1, count + 1))]]
    for model, steps in dict.fromkeys((cell.model, cell.steps) for cell in chunks):
        own = [cell for cell in chunks if (cell.model, cell.steps) == (model, steps)]
        rows.append([model, str(steps), *(_interval(cell.energy_distance) for cell in own)])
    return markdown_table(rows)


def panels(report: EvaluationReport) -> list[Panel]:
    """Make the panels of the plot. The fine solution is not part of the teacher's curve."""
    reference = "held-out data" if report.config.reference == "data" else "the guided teacher"
    drawn = [
        Panel(f"energy distance to {reference}", "log", _curves(report, lambda cell: cell.energy_distance)),
        Panel("error to the teacher's fine solution (rms)", "log", _curves(report, lambda cell: cell.trajectory_error)),
    ]
    if any(cell.recognition for cell in report.cells):
        accuracy = _curves(report, lambda cell: cell.recognition.accuracy if cell.recognition else None)
        drawn.append(Panel("class accuracy", "linear", accuracy))
    return drawn


def _curves(report: EvaluationReport, measure: Any) -> tuple[Curve, ...]:
    curves = []
    for model in dict.fromkeys(cell.model for cell in report.cells):
        cells = [cell for cell in report.cells if cell.model == model and cell.steps in report.config.steps]
        label = "teacher, Euler at its best shift" if model == TEACHER else model
        curves.append(Curve(label, tuple(cell.steps for cell in cells), tuple(measure(cell) for cell in cells)))
    return tuple(curve for curve in curves if curve.steps)


def _row(cell: ResultRow, oracle: bool, sharp: bool) -> list[str]:
    row = [cell.model, str(cell.steps), f"{cell.shift:g}", _interval(cell.energy_distance)]
    row += [_interval(cell.energy_ratio), _interval(cell.sliced_wasserstein), _interval(cell.trajectory_error)]
    if oracle:
        seen = cell.recognition
        row += [_interval(seen.accuracy), f"{seen.purity:.3f}"] if seen else ["", ""]
        row += [_interval(seen.sharpness if seen else None)] * sharp
    return row + (_nearest(cell.nearest) if cell.nearest else [])


def _nearest(nearest: Nearest) -> list[str]:
    return [_interval(nearest.mean), _interval(nearest.percentile_1), f"{nearest.minimum:.3f}"]


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _caption(report: EvaluationReport) -> str:
    config = report.config
    reference = "held-out samples" if config.reference == "data" else "samples of the guided teacher's fine solution"
    sentences = [
        f"{config.samples} samples from the same noise against {config.held_out_samples} {reference}, in latent space; "
        "95 % intervals.",
        f"The teacher takes Euler steps at the best of shifts {_listed(config.shifts)}; "
        f"its fine solution takes {config.fine_steps} steps at shift {config.shift:g}; guidance scale "
        f"{config.guidance_scale:g}; texts padded to {config.text_length} tokens.",
        "A ratio is left out if the teacher's distance may be zero.",
    ]
    if config.oracle != "none":
        judged = min(config.samples, config.oracle_samples)
        sentences.append(f"Class accuracy is measured on {judged} decoded samples.")
    if config.conditioning_frames:
        sentences.append(
            f"Students continue {config.conditioning_frames} latent frames of held-out clips; the teacher does not."
        )
    if report.training:
        sentences.append(
            f"Distances to the nearest of {report.training.clips} training clips: mean, 1 % quantile and minimum; "
            f"the last row shows {config.held_out_samples} held-out clips."
        )
    return " ".join(sentences)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
