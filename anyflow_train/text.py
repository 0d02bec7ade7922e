"""Pieces of what commands print: tables, hints, numbers."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable, Sequence


def nearest(wrong: str, valid: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The valid name that is spelled most like `wrong`.

    Args:
        cutoff: least similarity, from 0 (any) to 1 (equal).
    """
    return next(iter(difflib.get_close_matches(wrong, list(valid), n=1, cutoff=cutoff)), None)


def nearest_hint(wrong: str, valid: Iterable[str]) -> str:
    """`; nearest is 'x'` to end an error message with, or nothing where no valid name is near."""
    near = nearest(wrong, valid)
    return f"; nearest is {near!r}" if near else ""


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table that also reads on a terminal; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def calls(count: int) -> str:
    """`1 call`, `4 calls`."""
    return f"{count} call{'s' * (count != 1)}"


def timed_printer() -> Callable[[str], None]:
    """A `print` that begins each line with the seconds since now."""
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)

    return say
