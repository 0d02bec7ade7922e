"""Measure the host memory that is free for this process, including the limits of its container or job."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

OWN_GROUP = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Free memory in bytes."""
    return min(size for size in (psutil.virtual_memory().available, *_of_groups()) if size is not None)


def _of_groups() -> list[int | None]:
    """Free bytes in the control group of this process and in each of its parents (cgroup v2)."""
    with suppress(OSError, StopIteration):
        line = next(line for line in OWN_GROUP.read_text().splitlines() if line.startswith("0::"))
        own = GROUPS / line.removeprefix("0::").lstrip("/")
        return [_of_group(folder) for folder in (own, *own.parents) if folder.is_relative_to(GROUPS)]
    return []


def _of_group(folder: Path) -> int | None:
    with suppress(OSError, ValueError):  # no such file, or the limit is "max"
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # the page cache counts as used, but the system can free it
        return limit - used + int(counts["inactive_file"]) + int(counts["active_file"])
    return None
