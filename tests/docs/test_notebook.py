"""The notebook of the docs runs from its first to its last cell, and its outputs are pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebooks" / "first_distillation.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_it_is_plain_python_whose_outputs_are_pictures() -> None:
    assert len(CODE) > 5
    for cell in CELLS:
        # Lines of text would hold paths and times of one machine.
        assert all(output["data"].keys() == {"image/png", "text/plain"} for output in cell.get("outputs", ()))
        assert cell.get("execution_count") is None
    for source in CODE:
        compile(source, "cell", "exec")
        assert all(len(line) <= 120 for line in source.splitlines())


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_it_runs(tmp_path: Path) -> None:
    """Without Jupyter: the cells need nothing of it."""
    # Each figure is kept as a file, in the place of showing it.
    show = "import matplotlib.pyplot as plt\nplt.show = lambda: plt.savefig(f'figure{plt.gcf().number}.png')\n"
    (tmp_path / "notebook.py").write_text(show + "\n\n".join(CODE), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "notebook.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert {"figure1.png", "figure2.png", "notebook/pipeline/README.md", "notebook/videos/grid.mp4"} <= made
