"""How much memory of the machine is free for this process: the machine's, or what a container or job may use."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

MACHINE = Path("/proc/meminfo")
OWN_GROUP = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes; None where the system does not say (it is not Linux)."""
    known = [size for size in (_of_machine(), *_of_groups()) if size is not None]
    return min(known, default=None)


def _of_machine() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in MACHINE.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return None


def _of_groups() -> list[int | None]:
    """What is left in the control group of this process, and in each that holds it (cgroup v2)."""
    with suppress(OSError, StopIteration):
        line = next(line for line in OWN_GROUP.read_text().splitlines() if line.startswith("0::"))
        own = GROUPS / line.removeprefix("0::").lstrip("/")
        return [_of_group(folder) for folder in (own, *own.parents) if folder.is_relative_to(GROUPS)]
    return []


def _of_group(folder: Path) -> int | None:
    with suppress(OSError, ValueError):  # no such file, or the limit is "max"
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # files that were read or written count as used, but give way
        return limit - used + int(counts["inactive_file"]) + int(counts["active_file"])
    return None
