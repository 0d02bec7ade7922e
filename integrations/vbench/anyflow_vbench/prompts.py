"""The prompts that VBench measures a model on: its own, or a user's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anyflow_train.data.captions import read_lines
from anyflow_train.errors import UserError
from anyflow_train.evaluation.prompts import distinct, slug
from anyflow_vbench.config import Dimension, VBenchConfig


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        name: what its files are called, before `-0.mp4`. VBench finds its own prompts by this.
        prompt: what VBench expects to see.
        text: what the model is given.
        dimensions: what is measured on it.
    """

    name: str
    prompt: str
    text: str
    dimensions: frozenset[Dimension]

    def file(self, index: int) -> str:
        """Of its video number `index`."""
        return f"{self.name}-{index}.mp4"

    def seed(self, seed: int, index: int) -> int:
        """Of the noise of one video: another for each, as VBench asks for (prompts/README.md), and always the same.

        It does not depend on the model, its calls, nor on what else is measured.
        """
        return int(hashlib.sha256(f"{seed} {index} {self.prompt}".encode()).hexdigest()[:8], 16)


def read_prompts(config: VBenchConfig, info: Path | None) -> list[Prompt]:
    """The prompts of the chosen dimensions.

    Args:
        info: VBench's list of prompts; None where the user has prompts of their own.

    Raises:
        UserError: a file cannot be read, is empty or of another form, or no prompt is for these dimensions.
    """
    chosen = frozenset(config.chosen)
    if config.prompts is not None:
        lines = distinct(read_lines(config.prompts, "prompts"))
        if not lines:
            raise UserError("prompts", f"'{config.prompts}' holds no prompt; write one a line")
        return [Prompt(slug(number, line), line, line, chosen) for number, line in enumerate(lines)]
    assert info is not None
    prompts = [prompt for prompt in _suite(info, config.texts) if prompt.dimensions & chosen]
    if not prompts:
        raise UserError("dimensions", f"no prompt of '{info}' is for {', '.join(config.chosen)}")
    return prompts


def _suite(info: Path, texts: str | None) -> list[Prompt]:
    """All of VBench's prompts; those that it lists twice, once, with the first text."""
    entries = list(_entries(info))
    given = [prompt for prompt, _ in entries] if texts is None else read_lines(texts, "texts")
    if len(given) != len(entries):
        problem = f"'{texts}' has {len(given)} lines, but '{info}' has {len(entries)} prompts; give one line for each"
        raise UserError("texts", problem)
    merged: dict[str, Prompt] = {}
    for (prompt, dimensions), text in zip(entries, given, strict=True):
        first = merged.get(prompt, Prompt(prompt, prompt, text, frozenset()))
        merged[prompt] = Prompt(prompt, prompt, first.text, first.dimensions | dimensions)
    return list(merged.values())


def _entries(info: Path) -> Iterator[tuple[str, frozenset[Dimension]]]:
    """Prompt and dimensions of each entry: a list of `{"prompt_en": ..., "dimension": [...], ...}`."""
    try:
        for entry in json.loads(info.read_text(encoding="utf-8")):
            name = str(entry["prompt_en"])
            if "/" in name:
                raise ValueError(f"{name!r} cannot be the name of a file")
            yield name, frozenset(entry["dimension"])
    except OSError as error:
        raise UserError("info", f"'{info}' cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        problem = f"'{info}' is not VBench's VBench_full_info.json: {type(error).__name__}: {error}"
        raise UserError("info", problem) from None
