"""Findings of the rules about a decoded config."""

from __future__ import annotations

from dataclasses import dataclass

from anyflow_train.errors import UserError
from anyflow_train.text import is_within


@dataclass(frozen=True)
class Finding:
    """A contradiction between keys, or a warning about them.

    keys: the dotted keys involved; the user should change the first one.
    text: the bad values and what would be right.
    """

    keys: tuple[str, ...]
    text: str

    def error(self) -> UserError:
        """Convert to the exception that the command line prints."""
        return UserError(self.keys[0], self.text)

    def in_stage(self, number: int) -> Finding:
        """Name the stage of `objective.schedule` that a finding is about."""
        return Finding((f"objective.schedule.{number}", *self.keys), f"{self.keys[0]}: {self.text}")

    def involves(self, keys: set[str]) -> bool:
        """Whether a key of the finding is one of `keys` or inside one of them."""
        return any(is_within(mine, keys) for mine in self.keys)
