"""Conditioning frames in training: wrappers around any objective.

All samples of a step have the same conditioning frames. Processes whose network calls differ in number or size would
wait for each other, or hang.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from anyflow_train.config.chunks import Chunks
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.types import Past, Prefix, TeacherForced
from anyflow_train.objectives.types import Loss, Objective, Roles


@dataclass(frozen=True)
class FirstFrameGiven:
    """Gives the first latent frame as clean conditioning in a share of the steps. The loss covers the other frames.

    Attributes:
        objective: computes the loss.
        probability: share of the steps, in [0, 1].
    """

    objective: Objective
    probability: float

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss:
        if draw.shared("first frame given", 1)[0] < self.probability:
            batch = _given(batch, 1, batch.latents.shape[1], Prefix(batch.latents[:, :1]))
        return self.objective(roles, batch, draw)


@dataclass(frozen=True)
class ChunksGiven:
    """Trains on a sequence of chunks (FAR, arXiv 2503.19325). The newest chunks see the clean chunks before them.

    Attributes:
        objective: computes the loss of the newest chunks.
        chunks: division of a clip into chunks.
        long_share: share of the steps with a sequence so long that its oldest chunks are compressed.
    """

    objective: Objective
    chunks: Chunks
    long_share: float

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss:
        return self.objective(roles, in_chunks(batch, draw, self.chunks, self.long_share), draw)


@dataclass(frozen=True)
class WholeClip:
    """Runs an objective on the whole clip, in addition to another one, with independent random numbers."""

    objective: Objective

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss:
        return self.objective(roles, batch, draw.scoped("whole clip"))


def in_chunks(batch: Batch, draw: Draw, chunks: Chunks, long_share: float) -> Batch:
    """Cut the samples into a sequence of chunks, of which the newest are to be generated."""
    drawn = chunks.drawn(long_share, *draw.shared("chunks", 2))
    x, start, end = batch.latents, drawn.context, drawn.frames
    return _given(batch, start, end, TeacherForced(drawn.chunks, x[:, :start], x[:, start:end]))


def _given(batch: Batch, start: int, end: int, past: Past) -> Batch:
    """Select the frames from `start` to before `end` for generation, given `past`."""
    return replace(batch, latents=batch.latents[:, start:end], condition=batch.condition.after(past))
