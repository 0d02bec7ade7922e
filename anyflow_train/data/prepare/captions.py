"""Captions in files of others: their encodings, and the places in JSON where they stand."""

from __future__ import annotations

import codecs
import json
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from anyflow_train.files import parse_json
from anyflow_train.text import printable

NAMES = ("caption", "text", "prompt", "cap")
FILES = ("txt", "json")
BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it starts with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
GUESS = "cp1252"


class CaptionError(ValueError):
    """A caption, or a list of them, cannot be read. The message is the reason."""


def lower_names(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its names in lower case: lists of others say `Caption` and `caption`."""
    return {str(name).strip().lower(): value for name, value in row.items()}


@dataclass
class CaptionReader:
    """Reads captions as the config says.

    Attributes:
        key: name of the caption in JSON and of its column in lists; None tries `caption`, `text`, `prompt` and `cap`.
        encoding: encoding of texts that are not Unicode; None reads them as cp1252, and warns once.
    """

    key: str | None = None
    encoding: str | None = None
    _warned: bool = field(default=False, init=False, repr=False)

    def decode(self, data: bytes, name: str) -> str:
        """Decode a text: UTF-8, UTF-16 and UTF-32 by their mark, or the encoding of the config.

        Without an encoding in the config, each line that is not UTF-8 is read as cp1252. Detection by the letters is
        wrong too often: it reads a German list as Chinese.

        Args:
            data: content of the file.
            name: name of the file, for the warning.

        Raises:
            CaptionError: the bytes are not a text in that encoding.
        """
        encoding = next((encoding for mark, encoding in BOMS.items() if data.startswith(mark)), None)
        if encoding is None and b"\0" in data:
            if self.encoding is None:
                raise CaptionError("holds zero bytes, as UTF-16 does; set encoding=utf-16-le if it is")
            encoding = self.encoding
        try:
            return data.decode(encoding or "utf-8")
        except UnicodeDecodeError:
            encoding = encoding or self.encoding
        try:
            if encoding is not None:
                return data.decode(encoding)
        except UnicodeDecodeError as error:
            raise CaptionError(f"is not in the encoding {encoding}: {error.reason}") from None
        lines = enumerate(data.split(b"\n"), start=1)
        return "\n".join(self._decode_line(line, number, name) for number, line in lines)

    def _decode_line(self, line: bytes, number: int, name: str) -> str:
        with suppress(UnicodeDecodeError):
            return line.decode()
        try:
            text = line.decode(GUESS)
        except UnicodeDecodeError:
            raise CaptionError(f"has a line {number} that is not UTF-8 and not {GUESS}; set encoding=") from None
        if not self._warned:
            self._warned = True
            shown = printable(text.strip()[:80])
            where = f"{printable(name)} line {number} is not UTF-8"
            print(f"warning: {where}, read as {GUESS}; set encoding= if this is wrong: {shown}", file=sys.stderr)
        return text

    def from_file(self, data: bytes, kind: str, name: str) -> tuple[str, ...]:
        """Read the captions in a file.

        Args:
            data: content of the file.
            kind: `txt`, which is one caption or JSON; or `json`.
            name: name of the file, for a warning.

        Returns:
            All captions, without empty ones.

        Raises:
            CaptionError: the file is not text, its JSON is broken, or the caption in it is not text.
        """
        try:
            text = self.decode(data, name).strip()
        except CaptionError as error:
            raise CaptionError(f"unreadable caption: it {error}") from None
        if kind != "json" and not text.startswith("{"):
            return self.from_value(text)
        try:
            content = parse_json(text) if text else None
        except ValueError as error:
            raise CaptionError(f"broken JSON in the caption file: {error}") from None
        return self.from_row(content) if isinstance(content, dict) else self.from_value(content)

    def from_row(self, row: dict[str, Any]) -> tuple[str, ...]:
        """Read the captions of a JSON object or of a list's row. Raises CaptionError if they are not text."""
        row = lower_names(row)
        if self.key is not None and self.key.lower() not in row:
            raise CaptionError(f"no caption_key: {self.key}")
        names = NAMES if self.key is None else (self.key.lower(),)
        return self.from_value(next((row[name] for name in names if row.get(name)), None))

    def from_value(self, value: Any) -> tuple[str, ...]:
        """Read a text, or a list of texts. Raises CaptionError for anything else."""
        texts = value if isinstance(value, list) else [value]
        if not all(text is None or isinstance(text, str) for text in texts):
            wrong = next(text for text in texts if text is not None and not isinstance(text, str))
            raise CaptionError(f"the caption is not text: {printable(json.dumps(wrong, default=str)[:60])}")
        # JSON can hold halves of characters, which no file can store.
        cleaned = (text.encode("utf-8", "ignore").decode().strip() for text in texts if text)
        return tuple(text for text in cleaned if text)
