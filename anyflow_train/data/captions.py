"""Files of captions and prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from anyflow_train.errors import UserError
from anyflow_train.files import parse_json, regular

NAMES = ("caption", "text", "prompt")


def parse_captions(data: bytes) -> list[str]:
    """Return the captions of a shard's sample: those in JSON, under one of the usual names, or the whole text."""
    text = data.decode("utf-8", "replace").strip()
    try:
        content = parse_json(text)
    except ValueError:
        return [text]
    if not isinstance(content, dict):
        return [text]
    found = next((content[name] for name in ("captions", *NAMES) if content.get(name)), "")
    # Without halves of characters, which JSON can hold.
    texts = found if isinstance(found, list) else [found]
    return [str(text).encode("utf-8", "ignore").decode().strip() for text in texts]


def read_prompts(prompts: Sequence[str], key: str) -> tuple[str, ...]:
    """Return the prompts, or the lines of a single file that are not empty.

    Args:
        prompts: prompts, or one name of a file, which ends in `.txt` or exists.
        key: config key of the prompts, for errors.

    Raises:
        UserError: the file cannot be read.
    """
    if len(prompts) != 1 or not (prompts[0].endswith(".txt") or os.path.isfile(prompts[0])):
        return tuple(prompts)
    return tuple(line for line in read_lines(prompts[0], key) if line)


def read_lines(path: str, key: str) -> list[str]:
    """Read the lines of a text file, without surrounding white space.

    Args:
        path: text file in UTF-8.
        key: config key that names the file, for errors.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return [line.strip() for line in regular(Path(path).expanduser()).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(key, f"'{path}' cannot be read: {getattr(error, 'strerror', error)}") from None
