"""Draw and recognise the moving-shapes world: 36 classes of short clips, both in closed form.

A class is a shape, a colour and a direction: "a green triangle moving left". Everything else about a clip is where the
shape starts and its contrast. Shapes start anywhere, so the mean of all clips of a class is a blur, as it is for real
videos: a diffusion model that takes one Euler step shows that blur, and few calls matter.
A sampled video can be judged without a learned classifier: the mean colour gives the colour, and a matched filter along
each path gives shape and direction.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from anyflow_train.errors import UserError

DIRECTIONS = ("left", "right", "up", "down")
SHAPES = ("ball", "square", "triangle")
COLOURS = ("red", "green", "blue")
CAPTIONS = tuple(f"a {colour} {shape} moving {way}" for colour in COLOURS for shape in SHAPES for way in DIRECTIONS)
"""The prompt of each class number, such as "a green triangle moving left"."""
CLASSES = len(CAPTIONS)
WORDS = ("a", *COLOURS, *SHAPES, "moving", *DIRECTIONS)

FRAMES = 17
SIZE = 64
FRAMES_PER_SECOND = 16
BACKGROUND = (0.07, 0.07, 0.11)  # in [0, 1]
SPEED = 1.5  # pixels per frame
LEAST_CONTRAST = 0.85

_MOTION = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))  # (x, y) of each direction, y grows downwards
_RGB = ((0.95, 0.28, 0.25), (0.22, 0.82, 0.45), (0.25, 0.50, 0.98))  # of each colour, in [0, 1]
_REACH = 12.0  # pixels around a shape's centre that stay in the picture; only a triangle's corners reach further
_EDGE = 1.5  # pixels over which a shape's edge fades


class Reading(NamedTuple):
    """Classes of a batch of videos, and how clearly each was recognised.

    Attributes:
        labels: (B,) int64 class numbers.
        purity: (B,) float32 in [0, 1], cosine between the coloured part of the video and the recognised moving shape;
            at least 0.97 for a clean clip, low for blur and noise.
        sharpness: (B,) float32, the same cosine between their edges (differences of neighbouring pixels); at least 0.9
            for a clean clip, lower the softer the edges, near 0 for noise.
    """

    labels: Tensor
    purity: Tensor
    sharpness: Tensor


class Draw(NamedTuple):
    """Random values behind `count` clips, from which `render` draws them.

    Attributes:
        labels: (count,) int64 class numbers.
        start: (count, 2) float32 in [0, 1], where (x, y) the shape starts, within the room that keeps its path inside.
        contrast: (count,) float32 in [0, 1].
    """

    labels: Tensor
    start: Tensor
    contrast: Tensor


def split(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convert class numbers to (direction, shape, colour). The direction runs fastest, the colour slowest."""
    rest = labels // len(DIRECTIONS)
    return labels % len(DIRECTIONS), rest % len(SHAPES), rest // len(SHAPES)


def labels_of(captions: Sequence[str]) -> Tensor:
    """Return the class numbers (n,) int64 of n prompts. Raises UserError for a text that is not in `CAPTIONS`."""
    for caption in captions:
        if caption not in CAPTIONS:
            raise UserError("oracle", f"{caption!r} is not a caption of the moving shapes, such as {CAPTIONS[0]!r}")
    return torch.tensor([CAPTIONS.index(caption) for caption in captions])


def draw(count: int, seed: int) -> Draw:
    """Draw the values behind `count` clips: start uniform, contrast U[0.85, 1].

    The classes are balanced: every 36 consecutive clips hold each class once, in a drawn order.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(-(-count // CLASSES), CLASSES, generator=generator).argsort(1).flatten()[:count]
    start = torch.rand(count, 2, generator=generator)
    contrast = LEAST_CONTRAST + (1 - LEAST_CONTRAST) * torch.rand(count, generator=generator)
    return Draw(labels, start, contrast)


def draw_clips(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Render the clips of `draw(count, seed)`.

    Returns:
        clips (count, 3, 17, 64, 64) float32 in [-1, 1] (0.84 MB each) and labels (count,) int64.
    """
    drawn = draw(count, seed)
    return render(*drawn), drawn.labels


def render(labels: Tensor, start: Tensor, contrast: Tensor, frames: int = FRAMES, size: int = SIZE) -> Tensor:
    """Draw clips whose shapes stay inside of the picture.

    Args:
        labels, start, contrast: as in `Draw`.
        frames: F, at 1.5 pixels per frame.
        size: H = W in pixels.

    Returns:
        (B, 3, F, H, W) float32 in [-1, 1].
    """
    motion, way = motion_of(labels), SPEED * (frames - 1)
    low = _REACH + (motion < 0) * way
    high = size - _REACH - (motion > 0) * way
    return render_from(labels, low + start * (high - low), contrast, frames, size)


def render_from(labels: Tensor, first: Tensor, contrast: Tensor, frames: int, size: int) -> Tensor:
    """Draw clips whose shapes start at the pixel `first` (B, 2), x and y, which may be outside of the picture.

    Returns:
        (B, 3, F, H, W) float32 in [-1, 1].
    """
    _, shape, colour = split(labels)
    centres = first[:, None] + motion_of(labels)[:, None] * (SPEED * torch.arange(frames))[None, :, None]
    mask = (_coverage(shape, centres, size) * contrast[:, None, None, None])[:, None]
    tint = torch.tensor(_RGB)[colour][:, :, None, None, None]
    background = torch.tensor(BACKGROUND)[None, :, None, None, None]
    return 2 * (background * (1 - mask) + tint * mask) - 1


@torch.no_grad()
def recognise(video: Tensor) -> Reading:
    """Read the class of each video with its mean colour and a matched filter (shape, direction) at every place.

    Args:
        video: (B, 3, F, H, W) in [-1, 1], H = W.
    """
    seen = (video.float() + 1) / 2 - torch.tensor(BACKGROUND)[None, :, None, None, None]
    tints = torch.nn.functional.normalize(torch.tensor(_RGB) - torch.tensor(BACKGROUND), dim=1)
    colour = (seen.clamp_min(0).mean(dim=(2, 3, 4)) @ tints.T).argmax(1)
    mask = torch.einsum("bcfhw,bc->bfhw", seen, tints[colour]).clamp_min(0)
    filters = _filters(video.shape[2], video.shape[3])
    spectrum = torch.fft.rfft2(mask)
    match = torch.stack([_correlation(spectrum, mask.shape[-1], f).amax(1) for f in filters.spectra], 1) / filters.norms
    purity, best = match.max(1)
    edges = torch.stack([_edge_match(spectrum[[i]], mask.shape[-1], filters, int(best[i])) for i in range(len(best))])
    labels = best + len(DIRECTIONS) * len(SHAPES) * colour
    return Reading(labels, purity / _norm(mask), edges / _edge_norm(mask))


def motion_of(labels: Tensor) -> Tensor:
    """(B, 2) unit vector (x, y) of each class's direction."""
    return torch.tensor(_MOTION)[split(labels)[0]]


def _coverage(shape: Tensor, centres: Tensor, size: int) -> Tensor:
    """(B, F, H, W) in [0, 1], how much of each pixel a shape covers: shape (B,) int64, centres (B, F, 2) in pixels."""
    pixel = torch.arange(size) + 0.5
    x, y = torch.broadcast_tensors(
        pixel[None, None, None, :] - centres[..., 0, None, None],
        pixel[None, None, :, None] - centres[..., 1, None, None],
    )
    return (0.5 - _distance(shape[:, None, None, None], x, y) / _EDGE).clamp(0, 1)


def _distance(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Pixels from the edge of a shape around the origin, negative inside of it."""
    ball = (x.square() + y.square()).sqrt() - 9.5
    square = torch.maximum(x.abs(), y.abs()) - 8.5
    slope = math.sqrt(3) / 2
    triangle = torch.maximum(y - 7.5, torch.maximum(slope * x - y / 2, -slope * x - y / 2) - 6.5)
    return torch.where(shape == 0, ball, torch.where(shape == 1, square, triangle))


class _Filters(NamedTuple):
    """Matched filters, shape slowest: conjugate spectra (12, F, H, W / 2 + 1), norms and edge norms (12,)."""

    spectra: Tensor
    norms: Tensor
    edge_norms: Tensor


@lru_cache(maxsize=2)
def _filters(frames: int, size: int) -> _Filters:
    labels = torch.arange(len(SHAPES) * len(DIRECTIONS))
    way = SPEED * (torch.arange(frames) - (frames - 1) / 2)
    centres = size / 2 + motion_of(labels)[:, None] * way[None, :, None]
    masks = _coverage(split(labels)[1], centres, size)
    return _Filters(torch.fft.rfft2(masks).conj(), _norm(masks), _edge_norm(masks))


def _correlation(spectrum: Tensor, size: int, conjugate: Tensor) -> Tensor:
    """(B, H W) inner products of (B, F, H, W / 2 + 1) with a filter (F, H, W / 2 + 1) at every place."""
    return torch.fft.irfft2((spectrum * conjugate).sum(1), s=(size, size)).flatten(1)


def _edge_match(spectrum: Tensor, size: int, filters: _Filters, best: int) -> Tensor:
    """() inner product of the spatial differences of one video and of the filter, at the place where these match best.

    In the spectrum, the differences of both together are a factor: 2 - 2 cos(frequency), summed over both axes.
    """
    place = _correlation(spectrum, size, filters.spectra[best]).argmax(1)
    down = 2 - 2 * torch.cos(2 * math.pi * torch.fft.fftfreq(size))
    across = 2 - 2 * torch.cos(2 * math.pi * torch.fft.rfftfreq(size))
    factor = down[:, None] + across[None, :]
    return _correlation(spectrum * factor, size, filters.spectra[best])[0, place[0]] / filters.edge_norms[best]


def _norm(mask: Tensor) -> Tensor:
    """(B,) Euclidean norms, at least 1e-6."""
    return mask.flatten(1).norm(dim=1).clamp_min(1e-6)


def _edge_norm(mask: Tensor) -> Tensor:
    """(B,) norms of the differences between neighbouring pixels, across the border too."""
    across, down = mask - mask.roll(1, -1), mask - mask.roll(1, -2)
    return torch.sqrt(_norm(across) ** 2 + _norm(down) ** 2)
