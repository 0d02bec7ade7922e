"""The package stays small enough to be read: lines of code, without docstrings, comments, blank lines and imports."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "anyflow_train"
MOST_LINES = 16_578
MOST_LINES_OF_A_STEP = 2_500
# What a reader of one training step of the flow map objective goes through.
STEP = (
    "flow",
    "objectives/types.py",
    "objectives/guidance.py",
    "objectives/rebalance.py",
    "objectives/flow_map.py",
    "objectives/flow_matching.py",
    "models/transformer.py",
    "models/far_transformer.py",
    "models/backbone.py",
    "models/blocks.py",
    "models/embeddings.py",
    "models/rotary.py",
    "models/chunk_layout.py",
    "models/clean_copies.py",
    "models/kv_cache.py",
    "models/attend.py",
    "models/fused.py",
    "models/flow_map.py",
    "training/trainer.py",
    "training/updates.py",
    "training/step_statistics.py",
    "training/recipe.py",
    "training/engine",
    "data/loader.py",
    "data/batch.py",
    "data/shards.py",
    "data/order.py",
)
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if text or isinstance(node, ast.Import | ast.ImportFrom):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def total(paths: list[Path]) -> int:
    return sum(code_lines(path.read_text(encoding="utf-8")) for path in paths)


def files(name: str) -> list[Path]:
    """A file of the package, or all of a folder."""
    path = PACKAGE / name
    found = [path] if path.suffix else sorted(path.rglob("*.py"))
    assert found, f"{name} is not in the package any more: name what took its place"
    return found


def test_only_code_counts() -> None:
    source = '"""A module."""\n\nimport os  # why\nfrom a import (\n    b,\n)\n\n# a comment\nTEXT = """two\nlines"""\n'
    source += 'def f(x):\n    """Says\n    what.\n    """\n    return (  # why\n        x\n    )\n'
    assert code_lines(source) == 2 + 1 + 3  # the text, the head of the function, its return


def test_the_package_is_small() -> None:
    assert total(sorted(PACKAGE.rglob("*.py"))) <= MOST_LINES


def test_one_training_step_is_read_in_an_afternoon() -> None:
    assert total([path for name in STEP for path in files(name)]) <= MOST_LINES_OF_A_STEP
