"""Conditioning frames: which frames an objective generates, and which it is given."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from anyflow_train.config.chunks import Chunks
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.types import Prefix, TeacherForced
from anyflow_train.objectives.context import ChunksGiven, FirstFrameGiven, WholeClip
from anyflow_train.objectives.types import Loss, Roles
from tests.objectives.toys import SmallNetwork, batch_of, draw_of, one_network

CHUNKS = Chunks((1, 2, 2), 2)


@dataclass
class Seen:
    """An objective that only records its batches."""

    batches: list[Batch] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss:
        self.batches.append(batch)
        self.draws.append(draw)
        zeros = torch.zeros(len(batch.positions))
        return Loss(zeros, zeros, None, {})


def clips(positions: tuple[int, ...]) -> Batch:
    batch = batch_of(positions)
    frames = torch.arange(5.0).reshape(1, 5, 1, 1, 1).expand(len(positions), 5, 2, 2, 2)
    return Batch(frames, batch.condition, batch.negative, batch.keys, positions)


ROLES = one_network(SmallNetwork())


def frames_of(x: torch.Tensor) -> list[int]:
    return [int(value) for value in x[0, :, 0, 0, 0]]


def test_chunks_are_split_into_context_and_what_is_asked() -> None:
    seen = Seen()
    for step in range(80):
        ChunksGiven(seen, CHUNKS, 0.5)(ROLES, clips((0, 1)), draw_of((0, 1), step))
    found = {}
    for batch in seen.batches:
        past = batch.condition.past
        assert isinstance(past, TeacherForced)
        assert torch.equal(past.clean, batch.latents)
        found[past.chunks] = (frames_of(past.context), frames_of(batch.latents))
    assert found == {(1,): ([], [0]), (1, 2): ([], [0, 1, 2]), (1, 2, 2): ([0], [1, 2, 3, 4])}
    long = sum(len(batch.condition.past.chunks) == 3 for batch in seen.batches)  # pyright: ignore
    assert 25 < long < 55  # binomial(80, 1/2): the mean 40, give or take 3.4 standard deviations


def test_all_processes_of_a_step_draw_the_same_chunks() -> None:
    seen = Seen()
    for step in range(10):
        for positions in ((0, 1), (2, 3)):
            ChunksGiven(seen, CHUNKS, 0.5)(ROLES, clips(positions), draw_of(positions, step))
    pasts = [batch.condition.past for batch in seen.batches]
    chunks = [past.chunks for past in pasts if isinstance(past, TeacherForced)]
    assert chunks[::2] == chunks[1::2]
    assert len(set(chunks)) > 1


def test_the_first_frame_is_given_in_a_share_of_the_steps() -> None:
    seen = Seen()
    for step in range(100):
        FirstFrameGiven(seen, 0.3)(ROLES, clips((0,)), draw_of((0,), step))
    given = [batch for batch in seen.batches if isinstance(batch.condition.past, Prefix)]
    assert 14 < len(given) < 46  # binomial(100, 0.3): 30, give or take 3.5 standard deviations
    for batch in given:
        assert isinstance(batch.condition.past, Prefix)
        assert frames_of(batch.condition.past.frames) == [0]
        assert frames_of(batch.latents) == [1, 2, 3, 4]
    others = [batch for batch in seen.batches if batch.condition.past is None]
    assert len(others) + len(given) == 100
    assert all(frames_of(batch.latents) == [0, 1, 2, 3, 4] for batch in others)


def test_a_term_beside_another_has_random_numbers_of_its_own() -> None:
    seen, draw = Seen(), draw_of((0,))
    WholeClip(seen)(ROLES, clips((0,)), draw)
    assert not torch.equal(seen.draws[0].normal("noise", (4,)), draw.normal("noise", (4,)))
