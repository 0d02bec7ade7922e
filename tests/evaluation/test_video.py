"""Written videos can be played, and show the given frames."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from anyflow_train.evaluation.video import (
    GAP,
    HEADING,
    INK,
    LINE,
    ROW_LABEL_WIDTH,
    Frames,
    Grid,
    Heading,
    draw_grid,
    to_frames,
    write_gif,
    write_grid,
    write_mp4,
)


def moving_bar(count: int = 5, height: int = 32, width: int = 48) -> Frames:
    frames = np.full((count, height, width, 3), 20, dtype=np.uint8)
    for number in range(count):
        frames[number, :, 8 * number : 8 * number + 8] = (200, 60, 60)
    return frames


def read_mp4(path: Path) -> tuple[Frames, float]:
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        return frames.astype(np.uint8), float(container.streams.video[0].average_rate or 0)


def test_to_frames_maps_the_range_and_clips():
    video = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(3, 1, 1, 5)
    assert to_frames(video)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("fps", [16.0, 29.97])
def test_mp4_plays_back_what_was_written(tmp_path: Path, fps: float):
    frames = moving_bar()
    write_mp4(tmp_path / "new" / "bar.mp4", frames, fps)
    played, rate = read_mp4(tmp_path / "new" / "bar.mp4")
    assert played.shape == frames.shape
    assert rate == pytest.approx(fps, rel=1e-3)
    # The colour at the bar's edges loses half of its resolution; the brightness does not.
    assert np.abs(played.mean(3) - frames.mean(3)).mean() < 4


def test_odd_sizes_are_padded_not_refused(tmp_path: Path):
    write_mp4(tmp_path / "odd.mp4", moving_bar(height=33, width=47), 16)
    assert read_mp4(tmp_path / "odd.mp4")[0].shape[1:3] == (34, 48)


def test_the_same_frames_give_the_same_mp4(tmp_path: Path):
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, moving_bar(height=256), 16)  # of 32 rows libx264 would take one thread anyway
    content = (tmp_path / "a.mp4").read_bytes()
    assert content == (tmp_path / "b.mp4").read_bytes()
    # On machines with other numbers of cores too: libx264 notes its settings in the file.
    assert b" threads=1 lookahead_threads=1 " in content


def test_the_same_frames_give_the_same_mp4_whatever_lies_in_memory(tmp_path: Path):
    """On a processor with AVX-512 libx264 reads memory that it never set; on others this cannot fail."""
    random = np.random.default_rng(0)
    squares = random.integers(0, 128, (4, 4, 3)).repeat(8, axis=0).repeat(8, axis=1)
    drifting = np.stack([np.roll(squares, number, axis=1) for number in range(9)])
    frames = (drifting + random.integers(0, 30, drifting.shape)).astype(np.uint8)
    for number in range(20):
        write_mp4(tmp_path / "other.mp4", random.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8), 16)
        write_mp4(tmp_path / f"{number}.mp4", frames, 16)
    assert len({(tmp_path / f"{number}.mp4").read_bytes() for number in range(20)}) == 1


def test_gif_has_all_frames_and_repeats(tmp_path: Path):
    write_gif(tmp_path / "bar.gif", moving_bar(), 16)
    with Image.open(tmp_path / "bar.gif") as image:
        assert getattr(image, "n_frames", 1) == 5
        assert image.info["loop"] == 0
        durations = []
        for number in range(5):
            image.seek(number)
            durations.append(image.info["duration"])
    assert durations == [60, 60, 60, 60, 560]  # a pause, then the clip starts again


def test_gif_keeps_the_colours_of_a_few_moving_shapes(tmp_path: Path):
    """Soft edges of three colours on a dark background: what the tiny example shows."""
    distance = np.abs(np.arange(64)[None, :] - np.array([[16.0], [32.0], [48.0]]))
    strength = np.clip((12 - distance) / 12, 0, 1)[..., None]
    colours = np.array([[242, 71, 64], [56, 209, 115], [64, 128, 250]])[:, None, :]
    rows = (strength * colours + (1 - strength) * np.array([18, 18, 28])).astype(np.uint8)
    frames = np.stack([np.roll(rows.repeat(16, axis=0), shift, axis=1) for shift in range(9)])
    write_gif(tmp_path / "shapes.gif", frames, 16)
    with Image.open(tmp_path / "shapes.gif") as image:
        for number, frame in enumerate(frames):
            image.seek(number)
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - frame).max() <= 8


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "bar.mp4"
    path.write_bytes(b"old")
    with pytest.raises((ValueError, AttributeError)):
        write_mp4(path, moving_bar().astype(np.float64), 16)  # type: ignore[arg-type]  # the wrong type is the test
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_grid_holds_every_video_in_its_place():
    colours = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (200, 200, 0)]]
    videos = [[np.full((3, 32, 48, 3), colour, dtype=np.uint8) for colour in row] for row in colours]
    drawn = draw_grid(Grid(["a", "b"], ["1 call", "2 calls"], videos, 16), least=48, most=48)
    assert drawn.shape[0] == 3
    for row in colours:
        for colour in row:
            assert (drawn[1] == colour).all(axis=2).sum() == 32 * 48
    red, green, blue, yellow = (np.argwhere((drawn[1] == colour).all(axis=2)) for row in colours for colour in row)
    assert (red.max(0) < yellow.min(0)).all()
    assert (red.min(0)[0], yellow.min(0)[1]) == tuple(green.min(0))  # right of red, above yellow
    assert (yellow.min(0)[0], red.min(0)[1]) == tuple(blue.min(0))


def test_a_grid_with_a_missing_label_is_refused():
    with pytest.raises(ValueError, match="one label"):
        draw_grid(Grid(["a"], ["x", "y"], [[moving_bar()]], 16), 48, 48)
    with pytest.raises(ValueError, match="headings"):
        draw_grid(Grid(["a"], ["x"], [[moving_bar()]], 16, [Heading("teacher", 2, "#000000")]), 48, 48)


LABELS = {
    "short": ("a red ball", "1 call", "teacher"),
    "long": ("a green triangle moving left in front of a wall of very small bricks", "1024 calls" * 3, "runs/wan" * 20),
    "without spaces": ("W" * 60, "W" * 40, "W" * 90),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_labels_of_a_grid_stay_in_their_places(labels: tuple[str, str, str]):
    row, column, heading = labels
    videos = [[np.full((1, 64, 64, 3), 255, dtype=np.uint8)] * 3] * 2
    headings = [Heading(heading, 2, "#5f5f5f"), Heading(heading, 1, "#0072b2")]
    frame = draw_grid(Grid([row] * 2, [column] * 3, videos, 16, headings), 120, 120)[0]
    dark = (frame <= np.array(INK) + 60).all(axis=2)
    top = HEADING + LINE + GAP
    lefts = [ROW_LABEL_WIDTH, ROW_LABEL_WIDTH + 120 + GAP, ROW_LABEL_WIDTH + 2 * (120 + GAP) + GAP]
    assert frame.shape[:2] == (top + 2 * (120 + GAP), lefts[-1] + 120 + GAP)
    written = np.zeros_like(dark)
    for left in lefts:
        places = dark[HEADING : top - 1, left : left + 120]
        assert places.any()
        written[HEADING : top - 1, left : left + 120] = True
    for number in range(2):
        place = slice(top + number * (120 + GAP), top + number * (120 + GAP) + 120), slice(1, ROW_LABEL_WIDTH - GAP)
        assert dark[place].any()
        written[place] = True
    assert not (dark & ~written).any()
    # White letters on the headings' colours, none of them cut off at the edges.
    white = (frame[:HEADING] == 255).all(axis=2)
    for left, width in ((lefts[0], 240 + GAP), (lefts[2], 120)):
        assert white[:, left : left + width].any()
        assert not white[[0, 1, -2, -1], left : left + width].any()
        assert not white[:, [left, left + width - 1]].any()


def test_columns_of_one_heading_have_its_colour():
    videos = [[np.zeros((1, 64, 64, 3), dtype=np.uint8)] * 2]
    headings = [Heading("teacher", 1, "#5f5f5f"), Heading("student", 1, "#0072b2")]
    frame = draw_grid(Grid(["a"], ["1 call", "1 call"], videos, 16, headings), 120, 120)[0]
    teacher, student = (frame[-2, left + 60].astype(int) for left in (ROW_LABEL_WIDTH, ROW_LABEL_WIDTH + 120 + 2 * GAP))
    assert teacher[0] == teacher[1] == teacher[2] < 255
    assert student[2] > student[1] > student[0]  # a light blue


def test_write_grid_writes_both_files(tmp_path: Path):
    grid = Grid(["a red ball moving left"], ["1 call"], [[moving_bar()]], 16)
    write_grid(grid, tmp_path / "grid.mp4", tmp_path / "grid.gif")
    assert read_mp4(tmp_path / "grid.mp4")[0].shape[0] == 5
    assert (tmp_path / "grid.gif").stat().st_size < 50_000
