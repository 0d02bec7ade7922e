"""Clips generated chunk by chunk, against a closed form in which each chunk depends on the one before."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from anyflow_train.config.chunks import Chunks, Sequence
from anyflow_train.flow.causal import ClipSampler, chunk_by_chunk
from anyflow_train.flow.rollout import rollout
from anyflow_train.flow.sampler import guided, sample
from anyflow_train.flow.types import CachedContext, Condition, Prefix, TeacherForced
from tests.flow.oracles import NO_TEXT, GaussianData

CHUNKS = Chunks((1, 2, 2), 2)
MEAN, STD, FOLLOW = 0.7, 0.5, 0.6
"""The first chunk is N(MEAN, STD^2); each element of a later one N(FOLLOW * mean of the chunk before, STD^2)."""


@dataclass
class Oracle:
    """The exact flow map of that distribution; records the context that it encodes."""

    asked: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition.past, CachedContext)
        memory = condition.past.kv_cache
        mean = x.new_tensor(MEAN) if memory is None else memory
        assert isinstance(mean, Tensor)
        centred = GaussianData(mean=0.0, std=STD)
        span = (1 - t).reshape(-1, 1, 1, 1, 1)
        return centred.average_velocity(x - span * mean, t, r) - mean

    def encode_context(self, x: Tensor, chunks: tuple[int, ...], condition: Condition) -> Tensor:
        self.asked.append(chunks)
        return FOLLOW * x[:, -chunks[-1] :].mean(dim=(1, 2, 3, 4), keepdim=True)


def noise(batch: int = 3) -> Tensor:
    return torch.randn(batch, 5, 2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact(z: Tensor) -> Tensor:
    """Exact clip for given noise, chunk by chunk."""
    first = MEAN + STD * z[:, :1]
    second = FOLLOW * first.mean(dim=(1, 2, 3, 4), keepdim=True) + STD * z[:, 1:3]
    third = FOLLOW * second.mean(dim=(1, 2, 3, 4), keepdim=True) + STD * z[:, 3:]
    return torch.cat((first, second, third), dim=1)


@pytest.mark.parametrize("steps", [1, 2, 4, 50])
def test_the_oracle_gives_the_same_clip_in_any_number_of_steps(steps: int) -> None:
    z, oracle = noise(), Oracle()
    x = ClipSampler(sample, CHUNKS)(oracle, z, NO_TEXT, steps, 5.0)
    torch.testing.assert_close(x, exact(z), rtol=0, atol=1e-12)  # float64, tens of operations
    assert oracle.asked == [(1,), (1, 2)]


def test_given_chunks_stay_and_the_others_follow_them() -> None:
    z = noise()
    given = torch.full((3, 3, 2, 2, 2), 4.0, dtype=torch.float64)
    x = ClipSampler(sample, CHUNKS)(Oracle(), z, NO_TEXT, 2, 5.0, given)
    assert torch.equal(x[:, :3], given)
    torch.testing.assert_close(x[:, 3:], FOLLOW * 4.0 + STD * z[:, 3:], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("frames", "possible"), [(2, "1, 3"), (5, "1, 3"), (6, "1, 3")])
def test_given_frames_must_be_whole_chunks_and_leave_one(frames: int, possible: str) -> None:
    with pytest.raises(ValueError, match=rf"{frames} latent frames .* \[1, 2, 2\]; possible are {possible}"):
        ClipSampler(sample, CHUNKS)(Oracle(), noise(), NO_TEXT, 2, 5.0, torch.zeros(3, frames, 2, 2, 2))


def test_a_clip_of_other_frames_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the chunks \[1, 2, 2\] do not add up to 4 latent frames"):
        ClipSampler(sample, CHUNKS)(Oracle(), noise()[:, :4], NO_TEXT, 2, 5.0)


@pytest.mark.parametrize(("steps", "index"), [(1, 0), (2, 1), (8, 3)])
def test_a_rollout_is_the_law_too_and_its_gradient_stays_inside_of_a_chunk(steps: int, index: int) -> None:
    z = noise().requires_grad_()

    def generate(z: Tensor, condition: Condition) -> Tensor:
        return rollout(oracle, z, condition, steps, index, 5.0)

    oracle = Oracle()
    x = chunk_by_chunk(oracle, z, NO_TEXT, CHUNKS, generate)
    torch.testing.assert_close(x, exact(z.detach()), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(x[:, 3:].sum(), z)
    # d x / d z is STD inside the chunk; the cached context has no gradient.
    torch.testing.assert_close(gradient[:, 3:], torch.full_like(gradient[:, 3:], STD), rtol=0, atol=1e-12)
    assert gradient[:, :3].abs().max() == 0


def test_one_cached_context_is_alive_at_a_time() -> None:
    """Without gradient, the context of a chunk is freed before that of the next one is encoded: it can take GiB."""

    @dataclass
    class Watched(Oracle):
        contexts: list[weakref.ref[Tensor]] = field(default_factory=list)

        def encode_context(self, x: Tensor, chunks: tuple[int, ...], condition: Condition) -> Tensor:
            assert all(context() is None for context in self.contexts)
            made = super().encode_context(x, chunks, condition)
            self.contexts.append(weakref.ref(made))
            return made

    oracle = Watched()
    ClipSampler(sample, CHUNKS)(oracle, noise(), NO_TEXT, 2, 5.0)
    assert len(oracle.contexts) == 2


def test_guidance_remembers_both_texts() -> None:
    """The maps with and without text have separate caches. With linear maps the guided clip has a closed form."""

    @dataclass
    class ByText(Oracle):
        def encode_context(self, x: Tensor, chunks: tuple[int, ...], condition: Condition) -> Tensor:
            return super().encode_context(x, chunks, condition) + condition.text.mean()

    text, negative = Condition(torch.ones(3, 1, 1)), Condition(torch.zeros(1, 1, 1))
    z = noise()
    x = ClipSampler(sample, CHUNKS)(guided(ByText(), negative, 3.0), z, text, 1, 5.0)
    # One step from t = 1: u = z - mean - STD z, so the guided mean is mean_0 + 3 (mean_1 - mean_0) = mean_0 + 3.
    first = MEAN + STD * z[:, :1]
    second = FOLLOW * first.mean(dim=(1, 2, 3, 4), keepdim=True) + 3 + STD * z[:, 1:3]
    torch.testing.assert_close(x[:, :3], torch.cat((first, second), dim=1), rtol=0, atol=1e-12)


def test_a_network_that_makes_all_frames_together_goes_on_from_the_first() -> None:
    seen = []

    def flow_map(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        seen.append(condition.past)
        return GaussianData(MEAN, STD).average_velocity(x, t, r)

    z, given = noise(), torch.ones(3, 1, 2, 2, 2, dtype=torch.float64)
    x = ClipSampler(sample)(flow_map, z, NO_TEXT, 2, 5.0, given)
    assert torch.equal(x[:, :1], given)
    torch.testing.assert_close(x[:, 1:], MEAN + STD * z[:, 1:], rtol=0, atol=1e-12)
    assert all(isinstance(past, Prefix) and torch.equal(past.frames, given) for past in seen)
    with pytest.raises(ValueError, match="none is left to generate"):
        ClipSampler(sample)(flow_map, z, NO_TEXT, 2, 5.0, z)


def test_rows_of_a_condition() -> None:
    frames = torch.arange(3.0).reshape(3, 1, 1, 1, 1)
    condition = Condition(torch.zeros(3, 1, 1), past=TeacherForced((1, 1), frames, frames + 1))
    past = condition[1:].past
    assert isinstance(past, TeacherForced)
    assert past.context.flatten().tolist() == [1, 2]
    assert past.clean.flatten().tolist() == [2, 3]
    assert isinstance(condition.with_text(torch.ones(1, 1, 1)).past, TeacherForced)
    with pytest.raises(ValueError, match="cannot be split by sample"):
        condition.after(CachedContext((1,), None))[1:]


def test_drawn_sequences() -> None:
    chunks = Chunks((1, 3, 3, 3, 3, 3, 3, 2), 3)
    assert chunks.sequence(2) == Sequence((1, 3), 0)
    assert chunks.sequence(5) == Sequence((1, 3, 3, 3, 3), 4)
    long = {chunks.drawn(0.5, 0.4, number / 100) for number in range(100)}
    short = {chunks.drawn(0.5, 0.6, number / 100) for number in range(100)}
    assert long == {chunks.sequence(count) for count in range(4, 9)}
    assert short == {chunks.sequence(count) for count in range(1, 4)}
    assert {len(replace(chunks, partition=(1, 3)).drawn(0.5, 0.4, number).chunks) for number in (0.0, 0.99)} == {1, 2}
