"""Quality of every chunk of a clip: how much later ones suffer from the errors of those before them (exposure bias)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from torch import Tensor

from anyflow_train.evaluation.intervals import EnergyReference, Estimate, Resampling, percentile
from anyflow_train.evaluation.measure import SampleSet
from anyflow_train.evaluation.plot import Curve, Panel, write_plot
from anyflow_train.text import calls


@dataclass(frozen=True)
class ChunkCell:
    """One chunk of one model's samples.

    Attributes:
        model: its label.
        steps: network calls, of every chunk where the model makes them one by one.
        chunk: from 1.
        energy_distance: of the chunk's frames alone, unbiased, to those of the reference.
    """

    model: str
    steps: int
    chunk: int
    energy_distance: Estimate


def measure_chunks(
    partition: tuple[int, ...],
    reference: Tensor,
    reference_resampling: Resampling,
    sets: Mapping[str, Mapping[int, SampleSet]],
    resampling: Resampling,
) -> tuple[ChunkCell, ...]:
    """All chunks of all models.

    Args:
        partition: latent frames of each chunk.
        reference: (m, F, C, H, W), and how it is resampled.
        sets: model -> calls -> samples (n, F, C, H, W), and how these are resampled.
    """
    cells = []
    for chunk, (start, end) in enumerate(pairwise([0, *accumulate(partition)]), start=1):
        real = EnergyReference(reference[:, start:end], reference_resampling)
        for model, by_steps in sets.items():
            for steps, samples in by_steps.items():
                distance = percentile(real.replicates(samples.latents[:, start:end], resampling))
                cells.append(ChunkCell(model, steps, chunk, distance))
    return tuple(cells)


def write_chunk_plot(path: Path, cells: tuple[ChunkCell, ...]) -> None:
    """One panel for every number of calls, up to four of them."""
    panels = []
    for steps in sorted({cell.steps for cell in cells})[:4]:
        curves = []
        for model in dict.fromkeys(cell.model for cell in cells):
            own = [cell for cell in cells if (cell.model, cell.steps) == (model, steps)]
            curves.append(Curve(model, tuple(cell.chunk for cell in own), tuple(cell.energy_distance for cell in own)))
        panels.append(Panel(f"energy distance, {calls(steps)}", "log", tuple(curves), "chunk"))
    write_plot(path, panels)
