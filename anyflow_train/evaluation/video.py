"""Writing of videos and grids of videos as mp4 and GIF. Files appear only when they are complete."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from anyflow_train.data.mp4 import Frames as Frames
from anyflow_train.data.mp4 import to_frames as to_frames
from anyflow_train.data.mp4 import write_h264
from anyflow_train.files import atomic_file

Colour = tuple[int, int, int]

# Layout of a grid: pixels and colours. The background is opaque, so that the grid looks the same on every page.
GAP = 8
FONT_SIZE = 15
LINE = 19
HEADING = 28
ROW_LABEL_WIDTH = 116
INK = (28, 28, 32)
PAPER = (255, 255, 255)
PAUSE = 500
"""Milliseconds that a GIF rests on its last frame, so that the eye sees where a clip starts again."""


def write_mp4(path: Path, frames: Frames, fps: float) -> None:
    """Write H.264 that browsers play. Odd sizes are padded by one pixel, because the format requires even sizes."""
    padded = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    path.parent.mkdir(parents=True, exist_ok=True)
    # These options make the file depend on its frames alone. The default number of threads differs between
    # machines, and with AVX-512 libx264 reads memory that it never set.
    options = {"crf": "16", "threads": "1", "x264-params": "cpu-independent=1"}
    write_h264(path, padded, Fraction(fps).limit_denominator(1001), "yuv420p", options)


def write_gif(path: Path, frames: Frames, fps: float, colours: int = 256) -> None:
    """Write an endless GIF with one palette for all frames, so that it does not flicker.

    GIF counts time in hundredths of a second, so 16 frames per second play at 16.7.
    """
    palette = Image.fromarray(np.concatenate(list(frames))).quantize(colours)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    duration = [max(20, 10 * round(100 / fps))] * len(images)
    duration[-1] += PAUSE
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=duration, loop=0, optimize=True)


@dataclass(frozen=True)
class Heading:
    """A heading above neighbouring columns, with a colour (`#rrggbb`) that marks them."""

    label: str
    columns: int
    colour: str


@dataclass(frozen=True)
class Grid:
    """Videos with their labels.

    Attributes:
        rows: one label per row, usually the prompt.
        columns: one label per column.
        videos: frames by row and column, all of the same shape (F, H, W, 3).
        fps: frames per second.
        headings: headings of all columns from left to right; empty if there are none.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    videos: Sequence[Sequence[Frames]]
    fps: float
    headings: Sequence[Heading] = ()


def write_grid(grid: Grid, mp4: Path, gif: Path) -> None:
    """Write the grid as mp4, and as a smaller GIF."""
    write_mp4(mp4, draw_grid(grid, least=128, most=224), grid.fps)
    width = 96 if len(grid.videos[0][0]) > 40 else 120  # smaller cells for long clips, which make large files
    write_gif(gif, draw_grid(grid, width, width), grid.fps)


def draw_grid(grid: Grid, least: int, most: int) -> Frames:
    """Draw the frames of the whole grid, (F, height, width, 3).

    Args:
        grid: videos and labels.
        least: smallest width of one video in pixels; narrower videos are enlarged.
        most: largest width of one video in pixels; wider videos are reduced.

    Raises:
        ValueError: rows, columns or headings do not match the videos.
    """
    wide = {len(grid.columns), *map(len, grid.videos), sum(each.columns for each in grid.headings) or len(grid.columns)}
    if len(grid.videos) != len(grid.rows) or len(wide) > 1:
        raise ValueError("a grid needs one label for each row and for each column, and headings over all columns")
    count, height, width = grid.videos[0][0].shape[:3]
    tile_width = min(max(width, least), most)
    tile = (tile_width, round(height * tile_width / width))
    paper = _labelled_paper(grid, tile)
    drawn = []
    for number in range(count):
        picture = paper.copy()
        for row, videos in enumerate(grid.videos):
            for column, frames in enumerate(videos):
                frame = Image.fromarray(frames[number]).resize(tile, Image.Resampling.BICUBIC)
                picture.paste(frame, _corner(grid, tile, row, column))
        drawn.append(np.asarray(picture))
    return np.stack(drawn)


def _labelled_paper(grid: Grid, tile: tuple[int, int]) -> Image.Image:
    size = _corner(grid, tile, len(grid.rows), len(grid.columns))
    paper = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(paper)

    def write(x: int, y: int, label: str, width: int, size: int = FONT_SIZE, ink: Colour = INK, anchor: str = "mm"):
        """Write a label, shortened to a width in pixels."""
        font = ImageFont.load_default(size)
        while font.getlength(label) > width:
            label = f"{label.removesuffix('...')[:-1]}..."
        draw.text((x, y), label, fill=ink, font=font, anchor=anchor)

    for heading, end in zip(grid.headings, accumulate(each.columns for each in grid.headings), strict=True):
        left = _corner(grid, tile, 0, end - heading.columns)[0] - GAP // 2
        right = _corner(grid, tile, 0, end - 1)[0] + tile[0] + GAP // 2 - 1
        # A light tint of the heading's colour marks its columns.
        tint = tuple(round(255 - 0.22 * (255 - value)) for value in ImageColor.getrgb(heading.colour))
        draw.rectangle((left, 0, right, size[1]), fill=tint)
        draw.rectangle((left, 0, right, HEADING - 1), fill=heading.colour)
        write((left + right) // 2, HEADING // 2, heading.label, right - left - GAP, FONT_SIZE + 3, PAPER)
    for column, label in enumerate(grid.columns):
        x, y = _corner(grid, tile, 0, column)
        write(x + tile[0] // 2, y - (GAP + LINE) // 2, label, tile[0])
    for row, label in enumerate(grid.rows):
        lines = textwrap.wrap(label, 14, max_lines=max(1, tile[1] // LINE), placeholder=" ...")
        middle = _corner(grid, tile, row, 0)[1] + tile[1] // 2
        for number, line in enumerate(lines):
            y = middle + round(LINE * (number - (len(lines) - 1) / 2))
            write(GAP, y, line, ROW_LABEL_WIDTH - 2 * GAP, anchor="lm")
    return paper


def _corner(grid: Grid, tile: tuple[int, int], row: int, column: int) -> tuple[int, int]:
    """Return the upper left corner of a tile, in pixels. Columns under different headings are further apart."""
    header = LINE + GAP + HEADING * bool(grid.headings)
    wider = sum(column >= first for first in accumulate(heading.columns for heading in grid.headings[:-1]))
    return ROW_LABEL_WIDTH + column * (tile[0] + GAP) + wider * GAP, header + row * (tile[1] + GAP)
