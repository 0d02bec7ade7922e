"""The stripes world: its captions, its geometry and its oracle."""

import pytest
import torch

from anyflow_train.tiny import stripes as world


def _clip(label: int, phase: float = 0.0, contrast: float = 1.0, **shape: int) -> torch.Tensor:
    return world.render(torch.tensor([label]), torch.tensor([phase]), torch.tensor([contrast]), **shape)


def test_every_caption_names_one_class() -> None:
    captions = [world.caption(label) for label in range(world.CLASSES)]
    assert [world.label_of(caption) for caption in captions] == list(range(world.CLASSES))
    assert world.caption(0) == "wide red stripes drifting left"
    assert [world.caption(label) for label in (1, 4, 23)] == [
        "wide red stripes drifting right",
        "narrow red stripes drifting left",
        "narrow blue stripes drifting down",
    ]


@pytest.mark.parametrize("label", [-1, 24])
def test_a_label_outside_the_world_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match="is not in"):
        world.caption(label)


def test_a_foreign_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="not a caption"):
        world.label_of("two cats")


@pytest.mark.parametrize(("label", "axis", "step"), [(0, -1, -2), (1, -1, 2), (2, -2, -2), (3, -2, 2)])
def test_wide_stripes_move_two_pixels_a_frame(label: int, axis: int, step: int) -> None:
    # 32 pixels a cycle over 16 frames a cycle. The wave repeats within the 64 pixels, so rolling is exact up to
    # float32 rounding of the angle.
    video = _clip(label, phase=0.3)[0]
    torch.testing.assert_close(video[:, 1], video[:, 0].roll(step, dims=axis), atol=1e-4, rtol=0)


def test_a_smaller_clip_is_a_corner_of_the_larger() -> None:
    small, large = _clip(5, phase=0.2, size=32, frames=9), _clip(5, phase=0.2)
    torch.testing.assert_close(small, large[:, :, :9, :32, :32], atol=0, rtol=0)


def test_no_contrast_leaves_the_background() -> None:
    blank = _clip(7, contrast=0.0)
    assert blank.amax() == blank[:, 2].amax()
    torch.testing.assert_close(blank.std(dim=(2, 3, 4)), torch.zeros(1, 3), atol=1e-6, rtol=0)


def test_draws_are_balanced_bounded_and_repeatable() -> None:
    clips, labels = world.draw_clips(50, seed=3)
    assert clips.shape == (50, 3, 17, 64, 64)
    assert clips.min() >= -1
    assert clips.max() <= 1
    assert labels[:24].sort().values.tolist() == labels[24:48].sort().values.tolist() == list(range(24))
    drawn = world.draw(5000, seed=4)
    assert drawn.phase.min() >= 0
    assert drawn.phase.max() < world.PHASE_SPAN
    assert drawn.contrast.min() >= world.LEAST_CONTRAST
    assert drawn.contrast.max() <= 1
    assert torch.equal(world.draw_clips(50, seed=3)[0], clips)
    assert not torch.equal(world.draw(50, seed=4).labels, labels)


def test_the_oracle_knows_every_class_under_noise() -> None:
    clips, labels = world.draw_clips(48, seed=5)
    labels_seen, purity = world.recognise(clips)
    assert torch.equal(labels_seen, labels)
    # The soft stripe's fundamental holds most of its energy; the rest is its third harmonic.
    assert purity.min() > 0.95
    assert purity.max() < 1.001
    noisy = clips + 0.6 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    assert world.accuracy(noisy, labels) == 1.0
    assert world.recognise(noisy).purity.max() < purity.min()


def test_the_oracle_is_not_fooled_by_reversed_time() -> None:
    clips, labels = world.draw_clips(24, seed=6)
    backwards = world.recognise(clips.flip(2)).labels
    assert torch.equal(backwards, labels - labels % 4 + torch.tensor([1, 0, 3, 2])[labels % 4])


def test_noise_is_impure() -> None:
    noise = torch.randn(4, 3, 17, 64, 64, generator=torch.Generator().manual_seed(0))
    # One of 8 waves out of about 35 thousand degrees of freedom.
    assert world.recognise(noise).purity.max() < 0.01
