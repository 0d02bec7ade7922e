"""The drifting-stripes world: 24 classes of short clips, drawn in closed form and recognised in closed form.

A class is a direction, a width and a colour. Everything else about a clip is one phase and one contrast, so a
sampled video can be judged without a learned judge: a matched Fourier filter reads the direction and the width,
the mean colour reads the colour. One cycle takes 16 frames, which is a quarter of a cycle per latent frame of a
codec that compresses time by four.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from anyflow_train.tiny.classes import BACKGROUND, COLOURS, DIRECTIONS, FRAMES, MOTION, RGB, SIZE, Classes, paint

WIDTHS = ("wide", "narrow")
_CLASSES = Classes(WIDTHS, "{kind} {colour} stripes drifting {direction}")
CLASSES = len(_CLASSES)
WORDS = (*WIDTHS, *COLOURS, "stripes", "drifting", *DIRECTIONS)
caption, label_of, split = _CLASSES.caption, _CLASSES.label_of, _CLASSES.split

FRAMES_PER_CYCLE = 16
# Half a cycle, because with a whole one a small teacher must learn that the first frame says nothing about the
# direction: it then drifts the wrong way in a seventh of its clips.
PHASE_SPAN = 0.5
LEAST_CONTRAST = 0.75

_WAVELENGTH = (32.0, 16.0)  # pixels
_SHARPNESS = 1.6  # soft stripes: tanh of a cosine


class Reading(NamedTuple):
    """What the oracle saw in a batch of videos.

    Attributes:
        labels: (B,) int64 class numbers.
        purity: (B,) float32 share of the brightness variation that is in the winning wave; about .8 to 1 for a
            clean clip, near 0 for noise.
    """

    labels: Tensor
    purity: Tensor


def render(labels: Tensor, phase: Tensor, contrast: Tensor, frames: int = FRAMES, size: int = SIZE) -> Tensor:
    """Draws clips.

    Args:
        labels: (B,) int64 class numbers.
        phase: (B,) float32 cycles.
        contrast: (B,) float32 in [0, 1], brightness of the stripes over the background.
        frames: F, at 16 frames per cycle.
        size: H = W in pixels; a smaller size is the top left corner of a larger one.

    Returns:
        (B, 3, F, H, W) float32 in [-1, 1].
    """
    direction, width, colour = split(labels)
    position = _coordinates(size)[direction] / torch.tensor(_WAVELENGTH)[width][:, None, None]  # (B, H, W) cycles
    time = torch.arange(frames) / FRAMES_PER_CYCLE
    cycles = position[:, None] - time[None, :, None, None] + phase[:, None, None, None]
    wave = torch.tanh(_SHARPNESS * torch.cos(2 * math.pi * cycles)) / math.tanh(_SHARPNESS)
    return paint(colour, (0.5 + 0.5 * wave) * contrast[:, None, None, None])


class Draw(NamedTuple):
    """What `render` needs of `count` clips: labels (count,) int64, phase and contrast (count,) float32."""

    labels: Tensor
    phase: Tensor
    contrast: Tensor


def draw(count: int, seed: int) -> Draw:
    """Draws the values behind `count` clips: phase U[0, .5) cycles, contrast U[.75, 1].

    The classes are balanced: every 24 consecutive clips hold each class once, in a drawn order.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = _CLASSES.draw(count, generator)
    phase = PHASE_SPAN * torch.rand(count, generator=generator)
    contrast = LEAST_CONTRAST + (1 - LEAST_CONTRAST) * torch.rand(count, generator=generator)
    return Draw(labels, phase, contrast)


def draw_clips(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Renders the clips of `draw(count, seed)`.

    Returns:
        clips (count, 3, 17, 64, 64) float32 in [-1, 1] (0.84 MB each) and labels (count,) int64.
    """
    drawn = draw(count, seed)
    return render(*drawn), drawn.labels


@torch.no_grad()
def recognise(video: Tensor) -> Reading:
    """Reads the class of each video with a matched filter (direction, width) and the mean colour.

    Args:
        video: (B, 3, F, H, W) in [-1, 1], H = W; F = 17 covers the one cycle that the filter expects.
    """
    video = video.float()
    brightness = video.mean(1)
    brightness = (brightness - brightness.mean(dim=(1, 2, 3), keepdim=True)).flatten(1)
    waves = _waves(video.shape[2], video.shape[3])
    # Both halves of a real signal's spectrum hold its energy, hence the factor 2.
    energy = 2 * (brightness.to(waves.dtype) @ waves.T).abs().square() / waves[0].abs().square().sum()
    best = energy.argmax(1)
    purity = energy.amax(1) / brightness.square().sum(1).clamp_min(1e-6)
    return Reading(_CLASSES.join(best % len(DIRECTIONS), best // len(DIRECTIONS), _colour(video)), purity)


def accuracy(video: Tensor, labels: Tensor) -> float:
    """The share of videos (B, 3, F, H, W) whose recognised class is `labels` (B,)."""
    return (recognise(video).labels == labels).float().mean().item()


def _coordinates(size: int) -> Tensor:
    """(4, H, W) pixel coordinate along each direction of motion, at pixel centres."""
    centre = torch.arange(size) + 0.5
    motion = torch.tensor(MOTION)
    return motion[:, 0, None, None] * centre[None, None, :] + motion[:, 1, None, None] * centre[None, :, None]


def _colour(video: Tensor) -> Tensor:
    """(B,) index of the stripe colour nearest in direction to the mean colour over the background."""
    background = torch.tensor(BACKGROUND)
    seen = (video.mean(dim=(2, 3, 4)) + 1) / 2 - background
    known = torch.tensor(RGB) - background
    return (seen @ torch.nn.functional.normalize(known, dim=1).T).argmax(1)


@lru_cache(maxsize=4)
def _waves(frames: int, size: int) -> Tensor:
    """(8, F * H * W) complex64 conjugate waves, width slowest; the end frames count half, being one cycle apart."""
    window = torch.ones(frames)
    window[0] = window[-1] = 0.5
    time = torch.arange(frames) / FRAMES_PER_CYCLE
    position = _coordinates(size)[None] / torch.tensor(_WAVELENGTH)[:, None, None, None]  # (2, 4, H, W)
    angle = 2 * math.pi * (position[:, :, None] - time[:, None, None])
    return torch.polar(window[:, None, None].expand_as(angle).contiguous(), -angle).flatten(0, 1).flatten(1)
