"""Prompts for VBench: its own, or a user's."""

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
        name: file name of its videos, before `-0.mp4`. VBench finds its own prompts by this name.
        prompt: content that VBench expects.
        text: text for the model.
        dimensions: dimensions that use the prompt.
    """

    name: str
    prompt: str
    text: str
    dimensions: frozenset[Dimension]

    def file(self, index: int) -> str:
        """Return the file name of video number `index`."""
        return f"{self.name}-{index}.mp4"

    def seed(self, seed: int, index: int) -> int:
        """Return the seed of the noise of one video. It differs between videos, as VBench requires (prompts/README.md).

        It does not depend on the model, the number of calls or the other prompts.
        """
        return int(hashlib.sha256(f"{seed} {index} {self.prompt}".encode()).hexdigest()[:8], 16)


def read_prompts(config: VBenchConfig, info: Path | None) -> list[Prompt]:
    """Read the prompts of the chosen dimensions.

    Args:
        info: VBench's list of prompts; None if the user has their own prompts.

    Raises:
        UserError: a file cannot be read, is empty or has a wrong format, or no prompt is for these dimensions.
    """
    chosen = frozenset(config.chosen)
    if config.prompts is not None:
        lines = distinct(read_lines(config.prompts, "prompts"))
        if not lines:
            raise UserError("prompts", f"'{config.prompts}' has no prompts; write one prompt per line")
        return [Prompt(slug(number, line), line, line, chosen) for number, line in enumerate(lines)]
    assert info is not None
    prompts = [prompt for prompt in _suite(info, config.texts) if prompt.dimensions & chosen]
    if not prompts:
        raise UserError("dimensions", f"{', '.join(config.chosen)}: no prompt of '{info}' is for these; choose others")
    return prompts


def _suite(info: Path, texts: str | None) -> list[Prompt]:
    """Read all of VBench's prompts. A prompt that is listed twice is returned once, with the first text."""
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
    """Yield prompt and dimensions of each entry of a list of `{"prompt_en": ..., "dimension": [...], ...}`."""
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
