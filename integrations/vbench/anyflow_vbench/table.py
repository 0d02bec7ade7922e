"""Table of VBench's scores: one row per dimension, one column per model and number of calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow_train import __version__
from anyflow_train.files import replace_file, write_json
from anyflow_train.text import calls, markdown_table
from anyflow_vbench.config import Dimension, VBenchConfig
from anyflow_vbench.program import Result, overall


@dataclass(frozen=True)
class Column:
    """Column of the table: one model at one number of calls, with the existing results by dimension."""

    model: str
    calls: int
    results: dict[Dimension, Result]


def write_table(config: VBenchConfig, columns: list[Column]) -> None:
    """Write a row for each dimension, and VBench's overall scores if its own prompts were used."""
    totals = [
        overall({name: result.score for name, result in column.results.items()}) if not config.prompts else {}
        for column in columns
    ]
    rows = [["dimension", *(label(column.model, column.calls) for column in columns)]]
    for name in config.chosen:
        scores = [column.results.get(name) for column in columns]
        rows.append([name, *("" if found is None else f"{found.score:.4f}" for found in scores)])
    for name in ("quality", "semantic", "total"):
        if any(name in total for total in totals):
            rows.append([name, *(f"{total[name]:.4f}" if name in total else "" for total in totals)])
    table, out = "\n".join(markdown_table(rows)), Path(config.out).expanduser()
    replace_file(out / "vbench.md", f"{table}\n\n{_caption(config)}\n".encode())
    write_json(out / "vbench.json", _to_json(config, columns, totals))
    if any(column.results for column in columns):
        print(f"{table}\nwrote {out}/vbench.md and vbench.json")


def _caption(config: VBenchConfig) -> str:
    prompts = "VBench's prompts" if config.prompts is None else config.prompts
    given = "" if config.texts is None else f", with the texts in {config.texts}"
    static = " temporal_flickering is not limited to static videos." * ("temporal_flickering" in config.chosen)
    return (
        f"VBench scores of {config.videos} videos for each of {prompts}{given}; shift {config.shift:g}, guidance "
        f"scale {config.guidance_scale:g}.{static}"
    )


def _to_json(config: VBenchConfig, columns: list[Column], totals: Sequence[dict[str, float]]) -> dict[str, Any]:
    found = [
        {
            "model": column.model,
            "calls": column.calls,
            "scores": {name: {"score": r.score, "videos": len(r.files)} for name, r in column.results.items()},
            "overall": total,
        }
        for column, total in zip(columns, totals, strict=True)
    ]
    return {
        "package": "anyflow_train",
        "version": __version__,
        "config": config.model_dump(mode="json"),
        "columns": found,
    }


def label(model: str, count: int) -> str:
    """Format the header of a column."""
    return f"{model}, {calls(count)}"
