"""The files of an evaluation: the page `report.md`, its plots, and `report.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anyflow_train import __version__
from anyflow_train.config.commands import EvaluateConfig
from anyflow_train.evaluation.by_chunk import ChunkCell, write_chunk_plot
from anyflow_train.evaluation.intervals import Estimate
from anyflow_train.evaluation.measure import RealClips, ResultRow
from anyflow_train.evaluation.nearest import Nearest, TrainingSet
from anyflow_train.evaluation.oracle import Recognition
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
        real: the reference, measured as samples are.
        training: the training clips that samples were compared with; None if `training_shards` is not set.
        chunks: results for each chunk; empty if no model is causal.
    """

    config: EvaluateConfig
    cells: tuple[ResultRow, ...]
    seconds: float
    real: RealClips
    training: TrainingSet | None = None
    chunks: tuple[ChunkCell, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return numbers and intervals by name; values that do not apply are None."""
        head = {"package": "anyflow_train", "version": __version__, "interval": "95 %"}
        return head | asdict(self) | owner(self.config) | {"config": self.config.model_dump(mode="json")}


def owner(config: EvaluateConfig) -> dict[str, Any]:
    """Facts that tell reports apart: one that compares other models must not replace this one."""
    return {"models": list(config.models), "teacher": config.teacher, "held_out": config.held_out}


def write_report(folder: Path, report: EvaluationReport) -> str:
    """Write `report.md`, `report.json`, `quality.png` and, for causal models, `chunks.png`. Returns the tables.

    The page shows `grid.gif` if it is in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = "\n".join(table_lines(report))
    if report.chunks:
        tables += "\n\n" + "\n".join(chunk_lines(report.chunks))
        write_chunk_plot(folder / "chunks.png", report.chunks)
    write_json(folder / "report.json", report.to_json())
    write_plot(folder / "quality.png", panels(report))
    pictures = {"Videos by number of network calls": "grid.gif", "Quality by number of network calls": "quality.png"}
    parts = [
        f"# {' and '.join(dict.fromkeys(cell.model for cell in report.cells))}",
        *(f"![{text}]({name})" for text, name in pictures.items() if (folder / name).exists()),
        "\n".join([*summary_lines(report), "", "## All numbers"]),
        tables,
        _caption(report),
    ]
    with atomic_file(folder / "report.md") as file:
        file.write(("\n\n".join(parts) + "\n").encode())
    return tables


def summary_lines(report: EvaluationReport) -> list[str]:
    """Make the lines of a Markdown table that compares all models at the smallest numbers of calls."""
    measures = {"energy distance": lambda cell: cell.energy_distance.as_distance()}
    if report.real.recognition:
        measures = {"accuracy": lambda cell: str(cell.recognition.accuracy)} | measures
    models = list(dict.fromkeys(cell.model for cell in report.cells))
    rows = [["calls", *(f"{measure}: {model}" for measure in measures for model in models)]]
    cells = {(cell.model, cell.steps): cell for cell in reversed(report.cells)}
    for steps in sorted(report.config.calls)[:3]:
        rows.append([str(steps), *(text(cells[model, steps]) for text in measures.values() for model in models)])
    return markdown_table(rows)


def table_lines(report: EvaluationReport) -> list[str]:
    """Make the lines of a Markdown table with one row for each model and number of calls."""
    real, seen = report.real, report.real.recognition
    head = ["model", "calls", "shift", "energy distance", "of the teacher's", "sliced Wasserstein", "error to fine ODE"]
    head += list(seen.measures()) if seen else []
    head += ["to nearest training clip", "1 %", "minimum"] * bool(report.training)
    last = [_reference(report), "", "", f"< {real.energy_floor:.3f}", "", "", "", *_recognition(seen)]
    last += _nearest(report.training.held_out) if report.training else []
    return markdown_table([head, *map(_row, report.cells), last])


def chunk_lines(chunks: Sequence[ChunkCell]) -> list[str]:
    """Make the lines of a Markdown table of energy distances, with one column per chunk."""
    count = max(cell.chunk for cell in chunks)
    rows = [["model", "calls", *(f"chunk {number}" for number in range(1, count + 1))]]
    for model, steps in dict.fromkeys((cell.model, cell.steps) for cell in chunks):
        own = [cell for cell in chunks if (cell.model, cell.steps) == (model, steps)]
        rows.append([model, str(steps), *(cell.energy_distance.as_distance() for cell in own)])
    return markdown_table(rows)


def panels(report: EvaluationReport) -> list[Panel]:
    """Make the panels of the plot: the energy distance, and the measure that shows the differences best.

    With an oracle that is its accuracy or its sharpness, whichever varies more. Otherwise it is the error to the
    teacher's fine solution, on which that solution itself is no point.
    """
    floor = Estimate(report.real.energy_floor, 0.0, report.real.energy_floor)
    distances = _curves(report.cells, lambda cell: cell.energy_distance)
    drawn = Panel(f"energy distance to {_reference(report)}", "log", distances, real=floor)
    seen = report.real.recognition
    if seen is None:
        coarse = [cell for cell in report.cells if cell.steps in report.config.calls]
        errors = _curves(coarse, lambda cell: cell.trajectory_error)
        return [drawn, Panel("error to the teacher's fine solution (rms)", "log", errors)]
    rows = [cell.recognition.measures() for cell in report.cells if cell.recognition]
    name = max(rows[0], key=lambda name: max(row[name].value for row in rows) - min(row[name].value for row in rows))
    curves = _curves(report.cells, lambda cell: cell.recognition.measures()[name])
    title = "accuracy (all of the caption is right)" if name == "accuracy" else name
    return [drawn, Panel(title, "share", curves, better="higher", real=seen.measures()[name])]


def _curves(cells: Sequence[ResultRow], measure: Callable[[Any], Estimate]) -> tuple[Curve, ...]:
    curves = []
    for model in dict.fromkeys(cell.model for cell in cells):
        own = {cell.steps: measure(cell) for cell in cells if cell.model == model}
        curves.append(Curve(model, tuple(sorted(own)), tuple(own[steps] for steps in sorted(own))))
    return tuple(curves)


def _reference(report: EvaluationReport) -> str:
    return "real clips" if report.config.reference == "data" else "the guided teacher"


def _row(cell: ResultRow) -> list[str]:
    ratio = cell.energy_ratio.as_distance() if cell.energy_ratio else ""
    row = [cell.model, str(cell.steps), f"{cell.shift:g}", cell.energy_distance.as_distance(), ratio]
    row += [cell.sliced_wasserstein.as_distance(), str(cell.trajectory_error), *_recognition(cell.recognition)]
    return row + (_nearest(cell.nearest) if cell.nearest else [])


def _recognition(seen: Recognition | None) -> list[str]:
    return list(map(str, seen.measures().values())) if seen else []


def _nearest(nearest: Nearest) -> list[str]:
    return [str(nearest.mean), str(nearest.percentile_1), f"{nearest.minimum:.3f}"]


def _caption(report: EvaluationReport) -> str:
    config = report.config
    reference = "real clips" if config.reference == "data" else "samples of the guided teacher's fine solution"
    sentences = [
        f"{config.samples} samples from the same noise against {config.held_out_samples} {reference}, in latent space; "
        "95 % intervals.",
        f"The teacher takes Euler steps at the best of shifts {', '.join(f'{shift:g}' for shift in config.shifts)}; "
        f"its fine solution takes {config.fine_steps} steps at shift {config.shift:g}; guidance scale "
        f"{config.guidance_scale:g}; texts padded to {config.text_length} tokens.",
        "A ratio is left out if the teacher's distance may be zero.",
        f"Of sets of {config.samples} {reference}, 95 % have an energy distance below {report.real.energy_floor:.3f}: "
        "smaller distances show no difference.",
    ]
    if config.oracle != "none":
        judged = min(config.samples, config.oracle_samples)
        sentences.append(f"Accuracy is the share of {judged} decoded samples that show all of what their caption says.")
    if given := config.conditioning_frames:
        sentences.append(f"Students continue {given} latent frames of held-out clips; the teacher does not.")
    if report.training:
        sentences.append(f"Distance to the nearest of {report.training.clips} training clips: mean, 1 % and minimum.")
    return " ".join(sentences)
