"""Samples do not depend on how they are batched."""

import torch

from anyflow_train.evaluation.sampling import Inputs, draw_noise, padded_condition, sample_all
from anyflow_train.flow.causal import ClipSampler
from anyflow_train.flow.sampler import sample
from anyflow_train.flow.types import Condition

CPU = torch.device("cpu")
TEXTS = [torch.full((length, 2), float(length)) for length in (1, 3, 2, 5, 4)]


def toy(x: torch.Tensor, t: torch.Tensor, r: torch.Tensor, condition: Condition) -> torch.Tensor:
    shape = (-1, *[1] * (x.ndim - 1))
    return 0.5 * x + (t + r).view(shape) + condition.text.sum((1, 2)).view(shape)


def test_a_samples_noise_is_its_own():
    many, few = (draw_noise(count, (2, 3), seed=1, purpose="a") for count in (5, 3))
    assert torch.equal(many[:3], few)
    assert not torch.equal(many, draw_noise(5, (2, 3), seed=1, purpose="b"))
    assert not torch.equal(many, draw_noise(5, (2, 3), seed=2, purpose="a"))


def test_samples_do_not_depend_on_the_batch():
    noise = draw_noise(5, (1, 2, 2, 2), seed=0, purpose="test")
    whole, parts = (
        sample_all(ClipSampler(sample), toy, Inputs(noise, TEXTS, 6, batch, CPU), steps=3, shift=5.0)
        for batch in (5, 2)
    )
    torch.testing.assert_close(whole, parts, rtol=0, atol=0)
    one = sample(toy, noise[3:4], padded_condition(TEXTS[3:4], 6, CPU), 3, 5.0)
    torch.testing.assert_close(whole[3:4], one, rtol=0, atol=0)


def test_texts_are_padded_with_zeros():
    text = padded_condition(TEXTS[:2], 4, CPU).text
    assert text.shape == (2, 4, 2)
    assert text[0].sum() == 2
    assert text[1, 3:].abs().sum() == 0
