"""What a rule finds in a config that decoded."""

from __future__ import annotations

from dataclasses import dataclass

from anyflow_train.errors import UserError


@dataclass(frozen=True)
class Finding:
    """A contradiction between keys, or a warning about them.

    keys: the dotted keys involved; the first is the one whose change fixes it best.
    text: the bad values, and what would be right.
    """

    keys: tuple[str, ...]
    text: str

    def error(self) -> UserError:
        """As the exception that the command line prints."""
        return UserError(self.keys[0], self.text)

    def involves(self, keys: set[str]) -> bool:
        """Whether one of its keys is among `keys`, or inside of one of them."""
        return any(mine == key or mine.startswith(f"{key}.") for mine in self.keys for key in keys)
