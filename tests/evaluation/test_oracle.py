"""The oracle's verdict and its interval."""

import pytest
import torch

from anyflow_train.evaluation.oracle import judge_clips, mean_of, wilson
from anyflow_train.tiny import shapes


def test_judge_counts_the_videos_that_show_their_caption():
    clips, labels = shapes.draw_clips(24, seed=0)
    captions = [shapes.CAPTIONS[label] for label in labels]
    captions[0], captions[1] = captions[1], captions[0]  # two different classes, exchanged
    verdict = judge_clips(clips, captions, decode=lambda latents: latents, batch=7)
    assert verdict.accuracy.value == pytest.approx(22 / 24)
    part = judge_clips(clips, captions[:6], decode=lambda latents: latents, batch=4)
    assert part.accuracy.value == pytest.approx(4 / 6)
    noise = judge_clips(torch.randn_like(clips), captions, decode=lambda latents: latents, batch=24)
    assert noise.sharpness.high < 0.05


def test_shapes_have_a_sharpness_with_its_interval():
    clips, labels = shapes.draw_clips(36, seed=0)
    captions = [shapes.CAPTIONS[label] for label in labels]
    verdict = judge_clips(clips, captions, decode=lambda latents: latents, batch=20)
    assert verdict.accuracy.value == 1
    assert verdict.measures() == {"accuracy": verdict.accuracy, "sharpness": verdict.sharpness}
    assert 0.8 < verdict.sharpness.low < verdict.sharpness.value < verdict.sharpness.high <= 1


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    estimate = mean_of(torch.tensor([0.0, 1.0]).repeat(50))
    # Standard deviation 0.5 of 100 values: 0.5 +- 1.96 * 0.05.
    assert (estimate.value, estimate.high - estimate.low) == (0.5, pytest.approx(2 * 1.959964 * 0.05))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
def test_wilson_intervals_cover(share: float):
    trials = 120
    hits = torch.distributions.Binomial(trials, torch.tensor(share))
    torch.manual_seed(0)
    draws = hits.sample((2000,)).int().tolist()
    covered = sum(wilson(k, trials).low <= share <= wilson(k, trials).high for k in draws) / 2000
    # A share of whole numbers cannot be covered in exactly 95 %; Wilson's stays within a few percent of it.
    assert 0.91 < covered < 0.99


def test_wilson_has_a_width_at_one():
    estimate = wilson(512, 512)
    assert estimate.value == estimate.high == 1
    # Closed form: n / (n + z^2).
    assert estimate.low == pytest.approx(512 / (512 + 1.959964**2))
