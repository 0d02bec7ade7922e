"""The plot is readable: texts do not overlap or leave the picture, and the numbers on its axes are plain."""

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from anyflow_train.evaluation.intervals import Estimate
from anyflow_train.evaluation.plot import Curve, Panel, draw, write_plot

FLOOR = Estimate(0.27, 0.0, 0.27)
REAL = Estimate(1.0, 0.9, 1.0)


def curve(label: str, *values: float, steps: tuple[int, ...] = (1, 2, 4, 8, 32)) -> Curve:
    steps = steps[: len(values)]
    return Curve(label, steps, tuple(Estimate(value, value - 0.1, value + 0.1) for value in values))


def visible_texts(figure: Figure) -> list[Text]:
    figure.canvas.draw()
    return [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text() and text.get_visible()]


def assert_readable(figure: Figure) -> None:
    texts = visible_texts(figure)
    boxes = [text.get_window_extent() for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        inside = (
            figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
        )
        assert inside, f"{text.get_text()!r} leaves the picture"
    for (one, box), (other, other_box) in combinations(zip(texts, boxes, strict=True), 2):
        assert not box.overlaps(other_box), f"{one.get_text()!r} overlaps {other.get_text()!r}"
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label for label in axis.get_ticklabels(which="both") if label.get_text()]
            numbers = [float(label.get_text()) for label in labels]  # 0.5, not a power of ten
            assert len(numbers) >= 2
            assert all(low < high for low, high in pairwise(numbers))
            assert len({label.get_fontsize() for label in labels}) == 1


SHAPES = [
    Panel(
        "energy distance to real clips",
        "log",
        (curve("teacher", 15, 4, 0.7, 0.36, 0.21), curve("student", 0.9, 0.5, 0.4, 0.3)),
        real=FLOOR,
    ),
    Panel(
        "all of the caption is right (share of clips)",
        "share",
        (curve("teacher", 0.14, 0.5, 0.9, 0.94, 1), curve("student", 0.5, 0.8, 0.9, 0.9)),
        better="higher",
        real=REAL,
    ),
]
NARROW = [Panel("energy distance to real clips", "log", (curve("teacher", 0.71, 0.7, 0.7),), real=FLOOR)]
WIDE = [Panel("energy distance to the guided teacher", "log", (curve("teacher", 3000, 40, 0.5, 0.004),))]
EXACT = [Panel("error to the teacher's fine solution (rms)", "log", (Curve("a", (1, 2), (REAL, REAL)),))]
MANY = [
    Panel(
        "energy distance to real clips",
        "log",
        (curve("teacher", 9, 7, 5, 3, 2, 1, 1, 0.9, steps=(1, 2, 4, 8, 16, 32, 50, 128)),),
    )
]
CHUNKS = [
    Panel(f"energy distance, {n} calls", "log", (curve("runs/causal", 3, 2, 1, steps=(1, 2, 3)),), "chunk")
    for n in (2, 4, 8)
]


@pytest.mark.parametrize(
    "panels", [SHAPES, NARROW, WIDE, EXACT, MANY, CHUNKS], ids=["shapes", "narrow", "wide", "exact", "many", "chunks"]
)
def test_texts_are_inside_apart_and_plain(panels: list[Panel]):
    assert_readable(draw(panels))


def test_the_axes_have_the_numbers_that_a_reader_expects():
    left, right = draw(SHAPES).axes
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "2", "4", "8", "32"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["0.2", "0.5", "1", "2", "5", "10", "20"]
    assert [label.get_text() for label in right.get_yticklabels()] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert left.get_title("left").endswith("\nlower is better")
    assert right.get_title("left").endswith("\nhigher is better")


def test_numbers_of_calls_that_are_close_get_one_label():
    labels = [label.get_text() for label in draw(MANY).axes[0].get_xticklabels()]
    assert labels == ["1", "2", "4", "8", "16", "32", "50", "128"]
    close = [Panel("energy distance", "log", (curve("teacher", 3, 2, 1, steps=(1, 48, 50)),))]
    assert [label.get_text() for label in draw(close).axes[0].get_xticklabels()] == ["1", "50"]


def test_real_clips_are_a_line_and_a_range():
    left, right = draw(SHAPES).axes
    for axes, value in ((left, 0.27), (right, 1.0)):
        (line,) = [line for line in axes.get_lines() if line.get_label() == "real clips against real clips"]
        assert set(line.get_ydata()) == {value}
        assert axes.get_ylim()[0] < value < axes.get_ylim()[1]


def test_write_plot_draws_distances_of_zero_and_below(tmp_path: Path):
    curves = (curve("teacher", 6.0, 1.0, 0.2, 0.0), curve("student", 0.0, -0.05, -0.05, 0.0))
    path = tmp_path / "new" / "quality.png"
    shares = (curve("teacher", 0.0, 0.2, 0.5, 1.0),)
    write_plot(path, [Panel("energy distance", "log", curves), Panel("accuracy", "share", shares)])
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGBA"))
    assert pixels.shape[1] > 2 * pixels.shape[0] > 800
    assert (pixels[..., 3] == 255).all()  # an opaque background, also for pages in dark mode
    log_panel = pixels[: -pixels.shape[0] // 5, : pixels.shape[1] // 2, :3]  # without the legend below
    for colour in ((0x5F, 0x5F, 0x5F), (0x00, 0x72, 0xB2)):  # both curves are there
        assert (log_panel == colour).all(axis=2).sum() > 200


def test_what_is_above_zero_is_drawn_where_it_is_however_wide_its_interval():
    wide = Curve("student", (1, 2, 4), (Estimate(1.5, 0.7, 2.5), Estimate(0.66, -0.4, 1.9), Estimate(-0.1, -0.9, 1.4)))
    axes = draw([Panel("energy distance", "log", (wide,))]).axes[0]
    assert list(axes.get_lines()[0].get_ydata()) == [1.5, 0.66, 0.5]  # the last one at the edge
    lucky = Curve("student", (1, 2), (Estimate(1.5, 0.7, 2.5), Estimate(1e-9, -0.9, 1.0)))
    axes = draw([Panel("energy distance", "log", (lucky,))]).axes[0]
    assert list(axes.get_lines()[0].get_ydata()) == [1.5, 0.1]


def test_many_models_are_told_apart_and_named_within_the_picture():
    curves = tuple(curve(f"runs/on_policy_{number}", 6.0, 1.0) for number in range(12))
    figure = draw([Panel("energy distance", "log", curves), Panel("error", "log", curves)])
    figure.canvas.draw()
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    assert len(looks) == 12
    legend = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1
    assert_readable(figure)
