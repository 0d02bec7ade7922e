"""The drifting-stripes world: 24 classes of short clips, drawn in closed form and recognised in closed form.

A class is a direction, a width and a colour. Everything else about a clip is one phase and one contrast, so a
sampled video can be judged without a learned judge: a matched Fourier filter reads the direction and the width,
the mean colour reads the colour. One cycle takes 16 frames, which is a quarter of a cycle per latent frame of a
codec that compresses time by four.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

DIRECTIONS = ("left", "right", "up", "down")
WIDTHS = ("wide", "narrow")
COLOURS = ("red", "green", "blue")
CLASSES = len(DIRECTIONS) * len(WIDTHS) * len(COLOURS)
WORDS = (*WIDTHS, *COLOURS, "stripes", "drifting", *DIRECTIONS)

FRAMES = 17
SIZE = 64
FRAMES_PER_CYCLE = 16
FRAMES_PER_SECOND = 16
# Half a cycle, because with a whole one a small teacher must learn that the first frame says nothing about the
# direction: it then drifts the wrong way in a seventh of its clips.
PHASE_SPAN = 0.5
LEAST_CONTRAST = 0.75

_MOTION = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))  # (x, y) of each direction, y grows downwards
_WAVELENGTH = (32.0, 16.0)  # pixels
_RGB = ((0.95, 0.28, 0.25), (0.22, 0.82, 0.45), (0.25, 0.50, 0.98))  # in [0, 1]
_BACKGROUND = (0.07, 0.07, 0.11)
_SHARPNESS = 1.6  # soft stripes: tanh of a cosine


@dataclass(frozen=True)
class Stripes:
    """What one class looks like: indices into `DIRECTIONS`, `WIDTHS` and `COLOURS`."""

    direction: int
    width: int
    colour: int

    @property
    def label(self) -> int:
        """The class number in [0, 24): direction runs fastest, colour slowest."""
        return self.direction + len(DIRECTIONS) * (self.width + len(WIDTHS) * self.colour)

    @property
    def caption(self) -> str:
        return f"{WIDTHS[self.width]} {COLOURS[self.colour]} stripes drifting {DIRECTIONS[self.direction]}"


class Reading(NamedTuple):
    """What the oracle saw in a batch of videos.

    Attributes:
        labels: (B,) int64 class numbers.
        purity: (B,) float32 share of the brightness variation that is in the winning wave; about .8 to 1 for a
            clean clip, near 0 for noise.
    """

    labels: Tensor
    purity: Tensor


def stripes_of(label: int) -> Stripes:
    """The class numbered `label`; raises ValueError outside [0, 24)."""
    if not 0 <= label < CLASSES:
        raise ValueError(f"label {label} is not in [0, {CLASSES})")
    rest, direction = divmod(label, len(DIRECTIONS))
    colour, width = divmod(rest, len(WIDTHS))
    return Stripes(direction, width, colour)


def caption(label: int) -> str:
    """The prompt of a class, such as "wide red stripes drifting left"."""
    return stripes_of(label).caption


def label_of(caption: str) -> int:
    """The class number of a prompt written by `caption`; raises ValueError for any other text."""
    for label in range(CLASSES):
        if stripes_of(label).caption == caption:
            return label
    raise ValueError(f"{caption!r} is not a caption of the stripes world")


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
    direction, width, colour = _split(labels)
    position = _coordinates(size)[direction] / torch.tensor(_WAVELENGTH)[width][:, None, None]  # (B, H, W) cycles
    time = torch.arange(frames) / FRAMES_PER_CYCLE
    cycles = position[:, None] - time[None, :, None, None] + phase[:, None, None, None]
    wave = torch.tanh(_SHARPNESS * torch.cos(2 * math.pi * cycles)) / math.tanh(_SHARPNESS)
    mask = ((0.5 + 0.5 * wave) * contrast[:, None, None, None])[:, None]
    stripe = torch.tensor(_RGB)[colour][:, :, None, None, None]
    background = torch.tensor(_BACKGROUND)[None, :, None, None, None]
    return 2 * (background * (1 - mask) + stripe * mask) - 1


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
    rounds = -(-count // CLASSES)
    order = torch.rand(rounds, CLASSES, generator=generator).argsort(1).flatten()[:count]
    phase = PHASE_SPAN * torch.rand(count, generator=generator)
    contrast = LEAST_CONTRAST + (1 - LEAST_CONTRAST) * torch.rand(count, generator=generator)
    return Draw(order, phase, contrast)


def draw_clips(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Renders the clips of `draw(count, seed)`.

    Returns:
        clips (count, 3, 17, 64, 64) float32 in [-1, 1] (0.84 MB each) and labels (count,) int64.
    """
    drawn = draw(count, seed)
    return render(drawn.labels, drawn.phase, drawn.contrast), drawn.labels


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
    width, direction = best // len(DIRECTIONS), best % len(DIRECTIONS)
    return Reading(direction + len(DIRECTIONS) * (width + len(WIDTHS) * _colour(video)), purity)


def accuracy(video: Tensor, labels: Tensor) -> float:
    """The share of videos (B, 3, F, H, W) whose recognised class is `labels` (B,)."""
    return (recognise(video).labels == labels).float().mean().item()


def _split(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Class numbers to (direction, width, colour), the tensor form of `stripes_of`."""
    rest = labels // len(DIRECTIONS)
    return labels % len(DIRECTIONS), rest % len(WIDTHS), rest // len(WIDTHS)


def _coordinates(size: int) -> Tensor:
    """(4, H, W) pixel coordinate along each direction of motion, at pixel centres."""
    centre = torch.arange(size) + 0.5
    motion = torch.tensor(_MOTION)
    return motion[:, 0, None, None] * centre[None, None, :] + motion[:, 1, None, None] * centre[None, :, None]


def _colour(video: Tensor) -> Tensor:
    """(B,) index of the stripe colour nearest in direction to the mean colour over the background."""
    background = torch.tensor(_BACKGROUND)
    seen = (video.mean(dim=(2, 3, 4)) + 1) / 2 - background
    known = torch.tensor(_RGB) - background
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
