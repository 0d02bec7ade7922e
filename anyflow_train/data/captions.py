"""Caption files."""

from __future__ import annotations

import json

NAMES = ("caption", "text", "prompt")


def parse_caption(data: bytes) -> str:
    """The caption in a `.txt` or `.json` file: the JSON's `caption`, `text` or `prompt`, or else the text itself."""
    text = data.decode("utf-8", "replace").strip()
    try:
        content = json.loads(text)
    except ValueError:
        return text
    if not isinstance(content, dict):
        return text
    found = next((content[name] for name in NAMES if content.get(name)), "")
    return str(found).strip()
