"""Read a run's `metrics.jsonl`: at first a sample of its rows, then only what is new."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from anyflow_train.files import parse_json

WHOLE_BYTES = 1 << 20
"""Files up to this size are read whole."""
VALIDATION = "validation/"


class Metrics:
    """Rows of a metrics file. A long file is read at evenly spaced places, so that it opens in milliseconds.

    Args:
        path: the file; it may not exist yet.
        points: number of rows to read of a long file.
        every: steps between validations, whose rows are found by their steps; 0 means none.
    """

    def __init__(self, path: Path, points: int, every: int) -> None:
        self._path, self._points, self._every = path, points, every
        self._offset = 0
        self._inode = -1

    def read(self) -> list[dict[str, Any]]:
        """Return the rows that were not returned before, in order: at the first call a sample, later all new ones.

        A resumed run replaces its file. It is then read from the start.
        """
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                    if status.st_size > WHOLE_BYTES:
                        return self._sample(file, status.st_size)
                file.seek(self._offset)
                return self._lines(file.read())
        except OSError:
            return []

    def _lines(self, data: bytes) -> list[dict[str, Any]]:
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [row for line in whole.splitlines() if (row := decoded(line))]

    def _sample(self, file: BinaryIO, size: int) -> list[dict[str, Any]]:
        rows = [_row_after(file, size * number // self._points) for number in range(self._points)]
        file.seek(max(size - 65536, 0))
        tail = file.read()
        end = tail.rfind(b"\n") + 1
        self._offset = size - len(tail) + end
        last = decoded(tail[:end].splitlines()[-1]) if end else None
        rows += [last]
        newest = last["step"] if last else 0
        steps = range(self._every, int(newest) + 1, self._every) if self._every else ()
        stride = max(len(steps) // self._points, 1)
        for step in [*steps][::-1][::stride]:
            rows += _rows_of_step(file, size, step)
        unique = {(row["step"], VALIDATION in "".join(row)): row for row in rows if row}
        return [unique[key] for key in sorted(unique)]


def decoded(line: bytes) -> dict[str, Any] | None:
    """Decode a row; None for a damaged one. Numbers that are not finite become None, because JSON has none."""
    with suppress(ValueError, TypeError):
        row = parse_json(line)
        if isinstance(row["step"], int):
            return {name: value if _is_finite(value) else None for name, value in row.items()}
    return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _row_after(file: BinaryIO, offset: int) -> dict[str, Any] | None:
    """Read the first whole row after an offset."""
    file.seek(offset)
    if offset:
        file.readline()
    return decoded(file.readline())


def _rows_of_step(file: BinaryIO, size: int, step: int) -> list[dict[str, Any]]:
    """Find the rows of a step by bisection, because steps grow along the file."""
    low, high = 0, size
    while high - low > 4096:
        middle = (low + high) // 2
        row = _row_after(file, middle)
        low, high = (middle, high) if row and row["step"] < step else (low, middle)
    file.seek(low)
    near = file.read(16384).splitlines()[low > 0 :]
    return [row for line in near if (row := decoded(line)) and row["step"] == step]
