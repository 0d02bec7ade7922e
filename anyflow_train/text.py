"""Helpers for the output of commands: tables, hints, numbers."""

from __future__ import annotations

import difflib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

GIB = 1 << 30
MOST_NAMED = 5
"""Names that a message lists; the rest is counted or left out."""


def printable(text: str) -> str:
    """Escape what is not printable, such as line breaks, terminal codes and marks that turn the direction of text.

    Names and texts from files must not be able to forge or hide lines of the output.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def quoted(text: str) -> str:
    """Quote a text as the value of an override, with all of its characters."""
    doubled = re.sub(r"(\\+)(?='|\Z)", r"\1\1", text)  # elsewhere a backslash stands for itself
    return "'" + doubled.replace("'", "\\'") + "'"


def some(names: Iterable[str]) -> list[str]:
    """Take the first names, and dots for the others."""
    first = [*islice(names, MOST_NAMED + 1)]
    return [*first[:MOST_NAMED], "..."] if len(first) > MOST_NAMED else first


def public_name(source: str) -> str:
    """Remove local folders from a source: hub ids stay, and paths keep their last part."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() or path.is_absolute() or source.startswith(".") else source


def nearest(wrong: str, valid: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Find the valid name with the spelling closest to `wrong`; None if there is none.

    Args:
        cutoff: lowest similarity, from 0 (any) to 1 (equal).
    """
    return next(iter(difflib.get_close_matches(wrong, list(valid), n=1, cutoff=cutoff)), None)


def nearest_hint(wrong: str, valid: Iterable[str]) -> str:
    """Format `; nearest is 'x'` as the end of an error message; empty if no valid name is similar."""
    near = nearest(wrong, valid)
    return f"; nearest is {near!r}" if near else ""


def is_within(name: str, owners: Iterable[str]) -> bool:
    """Whether a dotted name is one of `owners`, or inside one of them."""
    return any(f"{name}.".startswith(f"{owner}.") for owner in owners)


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format a Markdown table with aligned columns, as lines; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def fit_terminal(text: str) -> str:
    """Leave out the last columns of Markdown tables that are wider than the terminal. Elsewhere all columns stay."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    lines = text.split("\n")
    fitted = [line[: line.rfind("|", 0, width) + 1] if line.startswith("|") else line for line in lines]
    more = ["(columns that this terminal has no room for are in the file)"] if fitted != lines else []
    return "\n".join(fitted + more)


def duration(seconds: float) -> str:
    """Format a time: `1:05`, `2:03:04`, `3d 02:00:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{rest:02d}" if hours or days else f"{minutes}:{rest:02d}"
    return f"{days}d {clock.zfill(8)}" if days else clock


def memory_size(size: float) -> str:
    """Format a number of bytes: `24.02 GiB`, or `4.3 MiB` where two decimals would show little of it."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def calls(count: int) -> str:
    """Format a number of calls: `1 call`, `4 calls`."""
    return f"{count} call{'s' * (count != 1)}"


def timed_printer() -> Callable[[str], None]:
    """Return a print function that starts each line with the seconds since this call."""
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)

    return say
