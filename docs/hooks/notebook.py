"""MkDocs hook: show the cells of the notebook on the page that links it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\]\((notebooks/\w+\.ipynb)\)")


def on_page_markdown(markdown: str, *, page: Any, **_context: Any) -> str:
    """Append the cells of a notebook to a page that links one."""
    path = LINK.search(markdown)
    if path is None:
        return markdown
    cells = json.loads((Path(page.file.abs_src_path).parent / path[1]).read_text(encoding="utf-8"))["cells"]
    return "\n\n".join([markdown, *map(_shown, cells[1:])])  # the first cell is the title


def _shown(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"]).replace("](../", "](")
    if cell["cell_type"] == "markdown":
        return text
    pictures = [output["data"]["image/png"] for output in cell["outputs"]]
    return "\n\n".join([f"```python\n{text}\n```", *(f"![](data:image/png;base64,{data})" for data in pictures)])
