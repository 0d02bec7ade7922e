"""Files of an evaluation."""

import json
from pathlib import Path

from anyflow_train.config.commands import EvaluateConfig
from anyflow_train.evaluation.intervals import Estimate
from anyflow_train.evaluation.measure import ResultRow
from anyflow_train.evaluation.oracle import Recognition
from anyflow_train.evaluation.report import EvaluationReport, panels, table_lines, write_report


def estimate(value: float) -> Estimate:
    return Estimate(value, value - 0.1, value + 0.1)


def make_report() -> EvaluationReport:
    config = EvaluateConfig(out="out", models=("runs/a",), teacher="t", held_out="h", steps=(1, 2), samples=8)
    seen = Recognition(Estimate(1.0, 0.9, 1.0), 0.8)
    cells = [
        ResultRow("teacher", 1, 1.0, estimate(5), estimate(1), estimate(0.9), None, seen),
        ResultRow("teacher", 2, 3.0, estimate(2), estimate(1), estimate(0.5), None, seen),
        ResultRow("a", 1, 5.0, estimate(1), estimate(1), estimate(0.4), estimate(0.2), seen),
        ResultRow("a", 2, 5.0, estimate(0.5), estimate(1), estimate(0.3), None, seen),
        ResultRow("teacher", 128, 5.0, estimate(0), estimate(0), estimate(0), None, seen),
    ]
    return EvaluationReport(config, tuple(cells), seconds=1.5)


def test_table_has_a_row_for_every_cell_with_its_interval():
    lines = table_lines(make_report())
    assert len(lines) == 2 + 5
    assert len({len(line) for line in lines}) == 1
    assert "0.200 [0.100, 0.300]" in lines[4]
    assert "class accuracy" in lines[0]


def test_the_fine_solution_is_no_point_of_a_curve():
    energy, _error, accuracy = panels(make_report())
    assert [curve.steps for curve in energy.curves] == [(1, 2), (1, 2)]
    assert accuracy.scale == "linear"


def test_write_report_writes_numbers_that_read_back(tmp_path: Path):
    table = write_report(tmp_path / "new", make_report())
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["cells"][2]["energy_ratio"] == {"value": 0.2, "low": 0.2 - 0.1, "high": 0.2 + 0.1}
    assert report["cells"][0]["energy_ratio"] is None
    assert report["config"]["samples"] == 8
    assert (tmp_path / "new" / "report.md").read_text().startswith(table)
    assert (tmp_path / "new" / "quality.png").stat().st_size > 5000
