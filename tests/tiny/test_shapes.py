"""The moving-shapes world: its captions, its geometry and its oracle."""

import pytest
import torch
from torch import Tensor, nn

from anyflow_train.errors import UserError
from anyflow_train.tiny import shapes as world
from world_vae import accuracy, start_of

MIDDLE = (0.5, 0.5)


def _clip(label: int, start: tuple[float, float] = MIDDLE, contrast: float = 1.0, **shape: int) -> Tensor:
    return world.render(torch.tensor([label]), torch.tensor([start]), torch.tensor([contrast]), **shape)


def _blurred(clips: Tensor, width: int) -> Tensor:
    return nn.functional.avg_pool3d(clips, (1, width, width), 1, (0, width // 2, width // 2))


def test_captions_name_every_class_once() -> None:
    assert world.labels_of(world.CAPTIONS).tolist() == list(range(world.CLASSES)) == list(range(36))
    assert world.CAPTIONS[0] == "a red ball moving left"
    assert world.CAPTIONS[4] == "a red square moving left"
    assert world.CAPTIONS[35] == "a blue triangle moving down"
    assert {word for caption in world.CAPTIONS for word in caption.split()} == set(world.WORDS)


def test_another_text_is_no_caption() -> None:
    with pytest.raises(UserError, match="oracle: 'two cats'"):
        world.labels_of(["two cats"])


@pytest.mark.parametrize("shape", range(3))
@pytest.mark.parametrize(("direction", "axis", "way"), [(0, -1, -3), (1, -1, 3), (2, -2, -3), (3, -2, 3)])
def test_shapes_move_one_and_a_half_pixels_a_frame(shape: int, direction: int, axis: int, way: int) -> None:
    video = _clip(direction + 4 * shape)[0]
    # Two frames are three whole pixels, and shapes stay away from the border, so rolling is exact up to rounding.
    torch.testing.assert_close(video[:, 2], video[:, 0].roll(way, dims=axis), atol=1e-4, rtol=0)


@pytest.mark.parametrize("corner", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])
def test_the_whole_path_is_inside_of_the_picture(corner: tuple[float, float]) -> None:
    background = (2 * torch.tensor(world.BACKGROUND) - 1)[:, None, None]
    for label in range(world.CLASSES):
        video = _clip(label, corner)[0]
        borders = [video[..., -1, :]]
        if world.split(label)[1] != 2:  # a triangle's corners may leave the picture by up to two pixels
            borders += [video[..., 0], video[..., -1], video[..., 0, :]]
        border = torch.cat(borders, dim=-1)
        torch.testing.assert_close(border, background.expand_as(border), atol=1e-6, rtol=0)


def test_a_start_outside_of_the_picture_cuts_the_shape() -> None:
    label, contrast = torch.tensor([1]), torch.ones(1)
    first = start_of(label, torch.tensor([[0.0, 16.0]]), 9)
    assert first.tolist() == [[-6.0, 16.0]]  # four frames of 1.5 pixels before the middle, moving right
    cut = world.render_from(label, first, contrast, 9, 32)
    whole = world.render_from(label, first + torch.tensor([[16.0, 0.0]]), contrast, 9, 32)
    torch.testing.assert_close(cut[..., :16], whole[..., 16:], atol=1e-5, rtol=0)


def test_no_contrast_leaves_the_background() -> None:
    blank = _clip(7, contrast=0.0)
    assert blank.amax() == blank[:, 2].amax()
    torch.testing.assert_close(blank.std(dim=(2, 3, 4)), torch.zeros(1, 3), atol=1e-6, rtol=0)


def test_the_mean_of_a_class_is_no_clip_of_it() -> None:
    """A model that takes one step can only show this mean: few calls matter."""
    drawn = world.draw(200, seed=8)
    clips = world.render(torch.full((200,), 8), drawn.start, drawn.contrast)
    mean = clips.mean(0, keepdim=True)
    # A shape covers about 7 % of the picture and may be anywhere in it: nowhere is the mean half as bright as a clip.
    assert mean.amax() - mean.amin() < 0.5 * (clips.amax() - clips.amin())
    assert world.recognise(mean).sharpness < 0.5


def test_draws_are_balanced_bounded_and_repeatable() -> None:
    clips, labels = world.draw_clips(74, seed=3)
    assert clips.shape == (74, 3, 17, 64, 64)
    assert clips.min() >= -1
    assert clips.max() <= 1
    assert labels[:36].sort().values.tolist() == labels[36:72].sort().values.tolist() == list(range(36))
    drawn = world.draw(5000, seed=4)
    assert drawn.start.shape == (5000, 2)
    assert drawn.start.min() >= 0
    assert drawn.start.max() <= 1
    assert drawn.contrast.min() >= world.LEAST_CONTRAST
    assert drawn.contrast.max() <= 1
    assert torch.equal(world.draw_clips(74, seed=3)[0], clips)
    assert not torch.equal(world.draw(74, seed=4).labels, labels)


def test_the_oracle_knows_every_class_under_noise() -> None:
    clips, labels = world.draw_clips(72, seed=5)
    seen = world.recognise(clips)
    assert torch.equal(seen.labels, labels)
    # The filter is at whole pixels, a clip anywhere between: half a pixel off takes most from an edge of 1.5 pixels.
    assert seen.purity.min() > 0.97
    assert seen.purity.max() < 1.001
    assert seen.sharpness.min() > 0.8
    assert seen.sharpness.max() < 1.001
    noisy = clips + 0.3 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    assert accuracy(noisy, labels) == 1.0
    assert world.recognise(noisy).purity.max() < seen.purity.min()


def test_a_clip_at_the_filters_own_place_is_pure_and_sharp() -> None:
    # Centred on a whole pixel halfway, as the filters are: the cosines are 1 up to rounding.
    seen = world.recognise(_clip(5))
    torch.testing.assert_close(seen.purity, torch.ones(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen.sharpness, torch.ones(1), atol=1e-4, rtol=0)


def test_blur_takes_sharpness_first() -> None:
    clips, labels = world.draw_clips(36, seed=7)
    clear, soft, softer = (world.recognise(video) for video in (clips, _blurred(clips, 3), _blurred(clips, 5)))
    assert torch.equal(softer.labels, labels)
    assert softer.sharpness.max() < soft.sharpness.min()
    assert soft.sharpness.max() < clear.sharpness.min()
    assert (clear.sharpness - soft.sharpness).mean() > 4 * (clear.purity - soft.purity).mean()


def test_the_oracle_is_not_fooled_by_reversed_time() -> None:
    clips, labels = world.draw_clips(36, seed=6)
    backwards = world.recognise(clips.flip(2)).labels
    assert torch.equal(backwards, labels - labels % 4 + torch.tensor([1, 0, 3, 2])[labels % 4])


def test_noise_is_neither_pure_nor_sharp() -> None:
    noise = torch.randn(4, 3, 17, 64, 64, generator=torch.Generator().manual_seed(0))
    # Noise is bright everywhere, of which a shape covers 7 %: the cosine is about its square root.
    assert world.recognise(noise).purity.max() < 0.3
    assert world.recognise(noise).sharpness.max() < 0.05
