"""MkDocs hook: turn formulas into MathML while the site is built, so that a page needs no script and no network.

`pymdownx.arithmatex` marks `$...$` as `<span class="arithmatex">` and `$$...$$` as `<div class="arithmatex">`.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_page_content(content: str, **_context: Any) -> str:
    """Replace every formula of a rendered page."""
    return FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match["tag"] == "div" else "inline"
    return convert(html.unescape(match["latex"]).strip(), display=display)
