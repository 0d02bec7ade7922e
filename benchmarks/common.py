"""Functions that the benchmarks share: the machine's name, alternating measurements, and the JSON file of results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch

# process: CPU seconds of all threads, which are meaningful also on a machine that other programs use.
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}

Result = TypeVar("Result")


def device_name(device: torch.device | str) -> str:
    """Name of the GPU, or of the CPU with its number of cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {os.cpu_count()} cores"


def facts(device: torch.device | str) -> dict[str, str]:
    """Facts at the beginning of every record: device, date, version of torch."""
    return {"device": device_name(device), "date": date.today().isoformat(), "torch": torch.__version__}


def heading(device: torch.device | str, *more: str) -> str:
    """Join the facts, and additional ones of a benchmark, into one line."""
    known = facts(device)
    return ", ".join([known["device"], known["date"], f"torch {known['torch']}", *more])


def write_json(path: Path | None, device: torch.device | str, record: Mapping[str, Any]) -> None:
    """Write the facts and a benchmark's results to a file; do nothing if there is no file."""
    if path is not None:
        path.write_text(json.dumps({**facts(device), **record}, indent=1) + "\n")


def in_turns(calls: Mapping[str, Callable[[], Result]], repeats: int, unmeasured: int = 1) -> dict[str, list[Result]]:
    """Repeat the calls alternately, so that a slow period of the machine affects all of them. Returns their results.

    Args:
        unmeasured: number of warm-up rounds, whose results are dropped.
    """
    found: dict[str, list[Result]] = {name: [] for name in calls}
    for number in range(unmeasured + repeats):
        for name, call in calls.items():
            result = call()
            found[name].extend([result] if number >= unmeasured else [])
    return found


def medians(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Median of every key over rows that all have the same keys."""
    rows = list(rows)
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
