"""Prompts from files, and how files are called after them."""

from __future__ import annotations

import re
from pathlib import Path

from anyflow_train.errors import UserError

SLUG_LENGTH = 40


def read_lines(path: str, key: str) -> list[str]:
    """The lines of a text file, without white space at their ends.

    Args:
        key: config key that names the file, for errors.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return [line.strip() for line in Path(path).expanduser().read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(key, f"'{path}' cannot be read: {error}") from None


def distinct(prompts: list[str]) -> list[str]:
    """Each prompt once, without empty ones."""
    return list(dict.fromkeys(prompt for prompt in prompts if prompt))


def slug(number: int, prompt: str) -> str:
    """A short name for files, such as `003_wide-red-stripes`."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:SLUG_LENGTH].strip("-") or "prompt"
    return f"{number:03d}_{words}"
