"""Quality of each chunk of a clip: how much later chunks suffer from errors in earlier ones (exposure bias)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from anyflow_train.evaluation.intervals import EnergyReference, Estimate, percentile
from anyflow_train.evaluation.measure import SampleEvaluator, SampleSet
from anyflow_train.evaluation.plot import Curve, Panel, write_plot
from anyflow_train.text import calls


@dataclass(frozen=True)
class ChunkCell:
    """One chunk of one model's samples.

    Attributes:
        model: label of the model.
        steps: network calls; for a causal model, calls per chunk.
        chunk: number of the chunk, from 1.
        energy_distance: unbiased distance between the chunk's frames and those of the reference.
    """

    model: str
    steps: int
    chunk: int
    energy_distance: Estimate


def measure_chunks(
    partition: tuple[int, ...], evaluator: SampleEvaluator, sets: Mapping[str, Mapping[int, SampleSet]]
) -> tuple[ChunkCell, ...]:
    """Measure all chunks of all models.

    Args:
        partition: latent frames of each chunk.
        evaluator: holds the reference and the resamplings.
        sets: samples by model and number of calls.
    """
    cells = []
    for chunk, (start, end) in enumerate(pairwise([0, *accumulate(partition)]), start=1):
        real = EnergyReference(evaluator.reference[:, start:end], evaluator.reference_resampling)
        for model, by_steps in sets.items():
            for steps, samples in by_steps.items():
                distance = percentile(real.replicates(samples.latents[:, start:end], evaluator.resampling))
                cells.append(ChunkCell(model, steps, chunk, distance))
    return tuple(cells)


def write_chunk_plot(path: Path, cells: tuple[ChunkCell, ...]) -> None:
    """Draw one panel for each number of calls, at most four."""
    panels = []
    for steps in sorted({cell.steps for cell in cells})[:4]:
        curves = []
        for model in dict.fromkeys(cell.model for cell in cells):
            own = [cell for cell in cells if (cell.model, cell.steps) == (model, steps)]
            curves.append(Curve(model, tuple(cell.chunk for cell in own), tuple(cell.energy_distance for cell in own)))
        panels.append(Panel(f"energy distance, {calls(steps)}", "log", tuple(curves), "chunk"))
    write_plot(path, panels)
