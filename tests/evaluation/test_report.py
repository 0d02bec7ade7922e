"""Files of an evaluation."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from anyflow_train.config.commands import EvaluateConfig
from anyflow_train.evaluation.intervals import Estimate
from anyflow_train.evaluation.measure import RealClips, ResultRow
from anyflow_train.evaluation.oracle import Recognition
from anyflow_train.evaluation.report import EvaluationReport, panels, summary_lines, table_lines, write_report


def estimate(value: float) -> Estimate:
    return Estimate(value, value - 0.1, value + 0.1)


def recognition(accuracy: float, sharpness: float) -> Recognition:
    return Recognition(estimate(accuracy), estimate(sharpness))


def make_report(*seen: Recognition, real: Recognition | None = None, **options: Any) -> EvaluationReport:
    """A report on a teacher and one student; `seen` are the oracle's results of its five rows."""
    settings: dict[str, Any] = {"out": "out", "models": ("runs/a",), "teacher": "t", "held_out": "h", "calls": (1, 2)}
    config = EvaluateConfig(**settings | {"samples": 8} | options)
    cells = [
        ResultRow("teacher", 1, 1.0, estimate(5), estimate(1), estimate(0.9)),
        ResultRow("teacher", 2, 3.0, estimate(2), estimate(1), estimate(0.5)),
        ResultRow("a", 1, 5.0, estimate(1), estimate(1), estimate(0.4), estimate(0.2)),
        ResultRow("a", 2, 5.0, estimate(-0.05), estimate(1), estimate(0.3)),
        ResultRow("teacher", 128, 5.0, estimate(0.05), estimate(0), Estimate(0, 0, 0)),
    ]
    cells = [replace(cell, recognition=seen[number]) if seen else cell for number, cell in enumerate(cells)]
    return EvaluationReport(config, tuple(cells), 1.5, RealClips(0.3, real))


def judged() -> EvaluationReport:
    """A report with an oracle whose accuracy varies more than its sharpness."""
    seen = [
        recognition(accuracy, sharpness)
        for accuracy, sharpness in ((0.1, 0.5), (0.5, 0.6), (0.6, 0.7), (0.9, 0.7), (1, 0.8))
    ]
    return make_report(*seen, real=recognition(1, 0.81), oracle="shapes")


def test_table_has_a_row_for_every_cell_and_one_for_real_clips():
    lines = table_lines(judged())
    assert len(lines) == 2 + 5 + 1
    assert len({len(line) for line in lines}) == 1
    assert "0.200 [0.100, 0.300]" in lines[4]
    assert "| accuracy " in lines[0]
    assert "| sharpness " in lines[0]
    assert [word for word in lines[-1].split(" ") if word][1:8] == ["real", "clips", "|", "|", "|", "<", "0.300"]
    assert "0.810 [0.710, 0.910]" in lines[-1]


def test_without_the_oracle_there_is_no_column_of_it():
    assert "accuracy" not in table_lines(make_report())[0]


def test_a_negative_distance_is_at_the_floor():
    row = table_lines(make_report())[5]
    assert "| at the floor (< 0.050) " in row
    assert "| 0.050 [0.000, 0.150] " in table_lines(make_report())[6]  # no negative end either
    assert "0.000 [0.000, 0.000]" in table_lines(make_report())[6]  # the error of the fine solution itself


def test_the_summary_compares_the_models_at_few_calls():
    lines = summary_lines(judged())
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "calls",
        "accuracy: teacher",
        "accuracy: a",
        "energy distance: teacher",
        "energy distance: a",
    ]
    assert len(lines) == 2 + 2
    assert "| 0.100 [0.000, 0.200] | 0.600 [0.500, 0.700] |" in lines[2]
    assert len(summary_lines(make_report(calls=(1, 2), models=()))) == 4


def test_the_panels_have_the_fine_solution_where_it_is_a_result():
    energy, accuracy = panels(judged())
    assert [curve.steps for curve in energy.curves] == [(1, 2, 128), (1, 2)]
    assert [curve.steps for curve in accuracy.curves] == [(1, 2, 128), (1, 2)]
    assert energy.real == Estimate(0.3, 0.0, 0.3)
    energy, error = panels(make_report())
    assert [curve.steps for curve in error.curves] == [(1, 2), (1, 2)]
    assert error.real is None


def test_the_second_panel_is_the_measure_of_the_oracle_that_separates():
    accuracy = panels(judged())[1]
    assert accuracy.title.startswith("accuracy")
    assert (accuracy.scale, accuracy.better, accuracy.real) == ("share", "higher", estimate(1))
    seen = [recognition(1, sharpness) for sharpness in (0.1, 0.3, 0.5, 0.7, 0.8)]
    sharpness = panels(make_report(*seen, real=recognition(1, 0.81), oracle="shapes"))[1]
    assert (sharpness.title, sharpness.real) == ("sharpness", estimate(0.81))


def test_write_report_writes_numbers_that_read_back(tmp_path: Path):
    table = write_report(tmp_path / "new", judged())
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["cells"][2]["energy_ratio"] == {"value": 0.2, "low": 0.2 - 0.1, "high": 0.2 + 0.1}
    assert report["cells"][0]["energy_ratio"] is None
    assert report["config"]["samples"] == 8
    assert report["real"]["energy_floor"] == 0.3
    page = (tmp_path / "new" / "report.md").read_text()
    assert table in page
    assert "![Quality by number of network calls](quality.png)" in page
    assert "grid.gif" not in page  # there are no videos
    assert (tmp_path / "new" / "quality.png").stat().st_size > 5000


def test_the_page_shows_videos_before_the_plot_before_numbers(tmp_path: Path):
    (tmp_path / "grid.gif").touch()
    write_report(tmp_path, judged())
    page = (tmp_path / "report.md").read_text()
    places = [
        page.index(text) for text in ("# teacher and a", "(grid.gif)", "(quality.png)", "| calls", "## All numbers")
    ]
    assert places == sorted(places)
    assert "95 % have an energy distance below 0.300" in page
