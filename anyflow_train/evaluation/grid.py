"""Many videos in one picture that moves: rows are prompts, columns are ways to sample them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from anyflow_train.evaluation.video import Frames, write_gif, write_mp4

GAP = 6
FONT_SIZE = 13
LINE = 16
ROW_LABEL_CHARACTERS = 15
ROW_LABEL_WIDTH = 118
INK = (28, 28, 32)
PAPER = (255, 255, 255)


@dataclass(frozen=True)
class Grid:
    """Videos with their labels.

    Attributes:
        rows: one label per row, usually the prompt.
        columns: one label per column; lines are parted by a line break.
        videos: [row][column] frames, all of one shape (F, H, W, 3).
        fps: frames per second.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    videos: Sequence[Sequence[Frames]]
    fps: float


def write_grid(grid: Grid, mp4: Path, gif: Path) -> None:
    """Write the grid as mp4, and smaller as GIF."""
    write_mp4(mp4, draw_grid(grid, least=112, most=224), grid.fps)
    write_gif(gif, draw_grid(grid, least=72, most=96), grid.fps)


def draw_grid(grid: Grid, least: int, most: int) -> Frames:
    """Frames of the whole grid, (F, height, width, 3).

    Args:
        grid: what is drawn.
        least, most: width of one video in the picture, in pixels; videos between these stay as they are.

    Raises:
        ValueError: rows or columns do not match the labels.
    """
    if len(grid.videos) != len(grid.rows) or any(len(row) != len(grid.columns) for row in grid.videos):
        raise ValueError("a grid needs one label per row and per column")
    count, height, width = grid.videos[0][0].shape[:3]
    tile_width = min(max(width, least), most)
    tile = (tile_width, round(height * tile_width / width))
    paper = _labelled_paper(grid, tile)
    drawn = []
    for number in range(count):
        picture = paper.copy()
        for row, videos in enumerate(grid.videos):
            for column, frames in enumerate(videos):
                picture.paste(_resized(frames[number], tile), _corner(grid, tile, row, column))
        drawn.append(np.asarray(picture))
    return np.stack(drawn)


def _labelled_paper(grid: Grid, tile: tuple[int, int]) -> Image.Image:
    right, bottom = _corner(grid, tile, len(grid.rows), len(grid.columns))
    paper = Image.new("RGB", (right, bottom), PAPER)
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default(FONT_SIZE)
    for column, label in enumerate(grid.columns):
        x, y = _corner(grid, tile, 0, column)
        lines = label.split("\n")
        for number, line in enumerate(lines):
            place = (x + tile[0] // 2, y - GAP // 2 - LINE * (len(lines) - number))
            draw.text(place, line, fill=INK, font=font, anchor="ma")
    for row, label in enumerate(grid.rows):
        _, y = _corner(grid, tile, row, 0)
        lines = textwrap.wrap(label, ROW_LABEL_CHARACTERS, max_lines=max(1, tile[1] // LINE), placeholder=" ...")
        top = y + (tile[1] - LINE * len(lines)) // 2
        for number, line in enumerate(lines):
            draw.text((GAP, top + LINE * number), line, fill=INK, font=font)
    return paper


def _corner(grid: Grid, tile: tuple[int, int], row: int, column: int) -> tuple[int, int]:
    """Upper left corner of a tile, in pixels."""
    header = LINE * max(label.count("\n") + 1 for label in grid.columns) + GAP
    return ROW_LABEL_WIDTH + column * (tile[0] + GAP), header + row * (tile[1] + GAP)


def _resized(frame: Frames, tile: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(frame)
    return image if image.size == tile else image.resize(tile, Image.Resampling.BICUBIC)
