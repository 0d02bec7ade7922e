"""What of a clip is given while the rest is trained, around any objective: the same frames for all samples of a step.

Processes that made another number of calls, or calls of another size, would wait for each other or hang.
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
    """In a share of the steps the first latent frame is given, clean, and the objective is asked of the others."""

    objective: Objective
    probability: float

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss:
        if draw.shared("first frame given", 1)[0] < self.probability:
            batch = _given(batch, 1, batch.latents.shape[1], Prefix(batch.latents[:, :1]))
        return self.objective(roles, batch, draw)


@dataclass(frozen=True)
class ChunksGiven:
    """A sequence of chunks (FAR, arXiv 2503.19325): each of the newest is learned from clean ones before it.

    Attributes:
        objective: asked of the newest chunks.
        chunks: of a clip.
        long_share: share of the steps whose sequence is so long that its oldest chunks are compressed.
    """

    objective: Objective
    chunks: Chunks
    long_share: float

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss:
        return self.objective(roles, in_chunks(batch, draw, self.chunks, self.long_share), draw)


@dataclass(frozen=True)
class WholeClip:
    """An objective beside another one, with random numbers of its own."""

    objective: Objective

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss:
        return self.objective(roles, batch, draw.scoped("whole clip"))


def in_chunks(batch: Batch, draw: Draw, chunks: Chunks, long_share: float) -> Batch:
    """The same samples as a sequence of chunks: what is asked for are the newest."""
    drawn = chunks.drawn(long_share, *draw.shared("chunks", 2))
    x, start, end = batch.latents, drawn.context, drawn.frames
    return _given(batch, start, end, TeacherForced(drawn.chunks, x[:, :start], x[:, start:end]))


def _given(batch: Batch, start: int, end: int, past: Past) -> Batch:
    """The same samples, of which frames `start` to `end` are asked for."""
    return replace(batch, latents=batch.latents[:, start:end], condition=batch.condition.after(past))
