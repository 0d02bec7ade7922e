"""Lists of clips: CSV, TSV, JSON, JSON lines, Parquet, and texts with one name per line."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from anyflow_train.data.prepare.captions import NAMES, CaptionError, CaptionReader, lower_names
from anyflow_train.errors import UserError, reason_of
from anyflow_train.files import parse_json, regular

VIDEO_COLUMNS = ("video", "path", "file", "file_name", "video_path", "filename", "file_path", "clip_path")
DELIMITERS = (",", ";", "\t")


class Row(NamedTuple):
    """A row: its place in the list (`line 3`), and its values by column, in lower case."""

    place: str
    values: dict[str, Any]


def read_rows(path: Path, reader: CaptionReader, key: str = "source") -> list[Row]:
    """Read a list by its extension. key: config key that names it, for errors.

    Raises:
        UserError: the file cannot be read or decoded, or a row of it is broken; file and line are named.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            rows = list(_parquet(path, reader))
        else:
            text = reader.decode(regular(path).read_bytes(), str(path))
            rows = list(READERS[kind](text))
    except OSError as error:
        raise UserError(key, f"{path} cannot be read: {error.strerror or error}") from None
    except CaptionError as error:
        raise UserError(key, f"{path} {error}") from None
    column = reader.key and reader.key.lower()
    if column and kind != ".txt" and rows and not any(column in row.values for row in rows):
        found = ", ".join(dict.fromkeys(str(name) for row in rows[:100] for name in row.values))
        raise UserError("caption_key", f"{reader.key!r} is in no row of {path}, which has: {found}")
    return rows


def video_name(row: Row, path: Path) -> str:
    """Return the name of a row's video. Raises UserError if there is none."""
    found = next((row.values[name] for name in VIDEO_COLUMNS if row.values.get(name)), None)
    if isinstance(found, dict):  # a video of the library `datasets`
        found = found.get("path")
    if not isinstance(found, str) or "\0" in found:
        advice = f"add one of the columns {', '.join(VIDEO_COLUMNS)}"
        raise UserError("source", f"{path} {row.place} names no video; {advice}")
    return found


def _csv(text: str) -> Iterator[Row]:
    header = text.lstrip().partition("\n")[0].lower()
    names = {*VIDEO_COLUMNS, *NAMES}
    split = {mark: {name.strip(' "\r') for name in header.split(mark)} for mark in DELIMITERS}
    mark = max(DELIMITERS, key=lambda mark: len(names & split[mark]))
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    columns: list[str] = []
    line = 0
    try:
        for row in rows:
            line = rows.line_num  # of the last line of the row
            if not columns:
                columns = [name.strip().lower() for name in row]
            elif len(row) > len(columns):
                problem = f"line {line} has {len(row)} fields, but the first line has {len(columns)}"
                raise CaptionError(f"{problem}; put captions with {mark!r} in quotes")
            elif row:  # a short row has no value for the last columns
                yield Row(f"line {line}", dict(zip(columns, row, strict=False)))
    except csv.Error as error:
        raise CaptionError(f"line {line + 1}: the row has a stray quote or a broken field ({error})") from None


def _json_lines(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise CaptionError(f"line {number} is not a JSON object")
            yield Row(f"line {number}", lower_names(row))


def _json(text: str) -> Iterator[Row]:
    """Read a list of objects; or an object whose names are videos, and its values captions or objects."""
    try:
        content = parse_json(text)
    except ValueError as error:
        raise CaptionError(f"is broken JSON: {error}") from None
    if isinstance(content, dict):
        content = [
            {"video": name, **(value if isinstance(value, dict) else {"caption": value})}
            for name, value in content.items()
        ]
    if not isinstance(content, list):
        raise CaptionError("is JSON, but not a list of objects and not an object of captions by video")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise CaptionError(f"entry {number} is not a JSON object: {json.dumps(row)[:60]}")
        yield Row(f"entry {number}", lower_names(row))


def import_parquet(path: Path, key: str) -> Any:
    """Import pyarrow's reader, which is an extra. Raises UserError about the config's `key` if it is not installed."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(key, f"{path} needs pyarrow; install it with `pip install pyarrow`") from None


def _parquet(path: Path, reader: CaptionReader) -> Iterator[Row]:
    parquet = import_parquet(path, "source")
    try:
        file = parquet.ParquetFile(path)
        wanted = {*VIDEO_COLUMNS, *NAMES, "key", (reader.key or "").lower()}
        columns = [name for name in file.schema_arrow.names if name.lower() in wanted]
        number = 0
        for batch in file.iter_batches(columns=columns):  # a column of bytes of videos is not read
            for row in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", lower_names(row))
    except ValueError as error:  # pyarrow's own errors are ValueErrors
        raise UserError("source", f"{path} is not a Parquet file: {reason_of(error)}") from None


def _names(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Row(f"line {number}", {"video": line.strip()})


READERS: dict[str, Callable[[str], Iterator[Row]]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _json_lines,
    ".json": _json,
    ".txt": _names,
}
SUFFIXES = (*READERS, ".parquet")
