"""The plot is a readable PNG even where distances are not above zero."""

from pathlib import Path

import numpy as np
from PIL import Image

from anyflow_train.evaluation.intervals import Estimate
from anyflow_train.evaluation.plot import Curve, Panel, write_plot


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
