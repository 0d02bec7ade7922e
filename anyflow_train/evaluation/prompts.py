"""Lists of prompts, and file names from prompts."""

from __future__ import annotations

import re
from collections.abc import Iterable

SLUG_LENGTH = 40


def distinct(prompts: Iterable[str]) -> list[str]:
    """Remove empty and repeated prompts."""
    return list(dict.fromkeys(prompt for prompt in prompts if prompt))


def slug(number: int, prompt: str) -> str:
    """Make a short file name from a prompt, such as `003_a-red-ball`."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:SLUG_LENGTH].strip("-") or "prompt"
    return f"{number:03d}_{words}"
