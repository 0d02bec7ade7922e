"""What the benchmarks share: the machine's name, taking turns, and the file of the figures."""

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

# process: processor seconds of all threads, which mean something where other programs want the same cores.
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}

Result = TypeVar("Result")


def device_name(device: torch.device | str) -> str:
    """Of the GPU; or of the CPU, with its number of cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {os.cpu_count()} cores"


def facts(device: torch.device | str) -> dict[str, str]:
    """What every record of figures begins with."""
    return {"device": device_name(device), "date": date.today().isoformat(), "torch": torch.__version__}


def heading(device: torch.device | str, *more: str) -> str:
    """The facts in a line, and what else a benchmark has to say of its run."""
    known = facts(device)
    return ", ".join([known["device"], known["date"], f"torch {known['torch']}", *more])


def write_json(path: Path | None, device: torch.device | str, record: Mapping[str, Any]) -> None:
    """Write the facts and a benchmark's own figures; nothing where no file is named."""
    if path is not None:
        path.write_text(json.dumps({**facts(device), **record}, indent=1) + "\n")


def in_turns(calls: Mapping[str, Callable[[], Result]], repeats: int, unmeasured: int = 1) -> dict[str, list[Result]]:
    """What the calls return, by name. They take turns, so that a slow minute of the machine strikes all of them.

    Args:
        unmeasured: rounds before the others, whose results are dropped.
    """
    found: dict[str, list[Result]] = {name: [] for name in calls}
    for number in range(unmeasured + repeats):
        for name, call in calls.items():
            result = call()
            found[name].extend([result] if number >= unmeasured else [])
    return found


def medians(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of every key apart; all rows have the same ones."""
    rows = list(rows)
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
