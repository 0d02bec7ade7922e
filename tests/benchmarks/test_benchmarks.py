"""Benchmarks of loading, preparing and starting at their smallest size: they end, and write their figures."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
FACTS = {"device", "date", "torch"}
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run a benchmark by its name and options, like `python benchmarks/NAME.py`. Returns its record."""

    def benchmark(name: str, *options: str) -> dict[str, Any]:
        file = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", [name, *options, "--json", str(file)])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return json.loads(file.read_text())

    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield benchmark
    torch.set_num_threads(threads)


def test_start_up_of_help(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    record = run("startup", "--only", "help", "--repeats", "1")
    assert record.keys() >= FACTS
    assert record["programs"].keys() == {"torch", "help"}
    for figures in record["programs"].values():
        assert figures.keys() == {"wall_best", "wall_median", "processor_best", "processor_median", "ratio"}
        assert all(value > 0 for value in figures.values())
    # Help imports no torch, whose import alone takes ten times as long.
    assert record["programs"]["help"]["ratio"] < 0.5
    printed = capsys.readouterr().out
    assert record["device"] in printed
    assert record["date"] in printed


def test_loader_against_what_a_step_needs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--experiment", "tiny", "--samples", "32", "--passes", "2", "--workers", "0", "2", "--repeats", "1")
    record = run("loader", *small, "--processes", "1", "--step-seconds", "2")
    assert record.keys() >= FACTS
    assert record["needed_samples_per_second"] == 32 / 2  # a global batch of 32
    assert list(record["sides"]) == ["ours, 0 workers", "ours, 2 workers", "stock", "stock, batched"]
    for figures in record["sides"].values():
        assert figures["first_batch_seconds"] > 0
        assert figures["of_need"] == pytest.approx(figures["samples_per_second"] / 16)
    assert "page cache warm" in capsys.readouterr().out


def test_prepare_writes_what_the_plain_way_does(run: Run) -> None:
    record = run("prepare", "--clips", "2", "--repeats", "1")
    assert record.keys() >= FACTS
    assert record["ways"].keys() == {"ours", "one by one"}
    assert record["parts"].keys() == {"decode", "VAE", "text", "write"}
    assert record["ratios"].keys() == {"wall", "processor"}
    # float32 sums in other orders: some 1e-6 of numbers up to 5
    assert max(record["differences"].values()) < 1e-4
