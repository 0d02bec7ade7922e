"""The page on own objectives shows the examples as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["shortcut", "loss"])
def test_the_page_holds_the_example_in_full(name: str) -> None:
    example = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert f"```python\n{example}```" in (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
