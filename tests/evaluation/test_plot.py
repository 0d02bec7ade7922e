"""The plot is a readable PNG even where distances are not above zero."""

from pathlib import Path

import numpy as np
from PIL import Image

from anyflow_train.evaluation.intervals import Estimate
from anyflow_train.evaluation.plot import Curve, Panel, draw, write_plot


def curve(label: str, *values: float) -> Curve:
    steps = tuple(2**number for number in range(len(values)))
    return Curve(label, steps, tuple(Estimate(value, value - 0.1, value + 0.1) for value in values))


def test_write_plot_draws_distances_of_zero_and_below(tmp_path: Path):
    curves = (curve("teacher", 6.0, 1.0, 0.2, 0.0), curve("student", 0.0, -0.05, -0.05, 0.0))
    path = tmp_path / "new" / "quality.png"
    write_plot(path, [Panel("energy distance", "log", curves), Panel("class accuracy", "linear", curves)])
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 2 * pixels.shape[0] > 800
    log_panel = pixels[: -pixels.shape[0] // 5, : pixels.shape[1] // 2]  # without the legend below
    for colour in ((0x5F, 0x5F, 0x5F), (0x00, 0x72, 0xB2)):  # both curves are there
        assert (log_panel == colour).all(axis=2).sum() > 200


def test_what_is_above_zero_is_drawn_where_it_is_however_wide_its_interval():
    wide = Curve("student", (1, 2, 4), (Estimate(1.5, 0.7, 2.5), Estimate(0.66, -0.4, 1.9), Estimate(-0.1, -0.9, 1.4)))
    axes = draw([Panel("energy distance", "log", (wide,))]).axes[0]
    assert list(axes.get_lines()[0].get_ydata()) == [1.5, 0.66, 0.66]  # the last one at the edge
    lucky = Curve("student", (1, 2), (Estimate(1.5, 0.7, 2.5), Estimate(1e-9, -0.9, 1.0)))
    axes = draw([Panel("energy distance", "log", (lucky,))]).axes[0]
    assert list(axes.get_lines()[0].get_ydata()) == [1.5, 0.1]


def test_many_models_are_told_apart_and_named_within_the_picture():
    curves = tuple(curve(f"runs/on_policy_{number}", 6.0, 1.0) for number in range(12))
    figure = draw([Panel("energy distance", "log", curves), Panel("class accuracy", "linear", curves)])
    figure.canvas.draw()
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    assert len(looks) == 12
    legend = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1
