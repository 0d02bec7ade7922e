"""Groups in the config folders, their choices, and the command of each experiment."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

EXPERIMENT = "experiment"
# A comment before the first key.
_TITLE = re.compile(r"(#.*\n)*?# anyflow (?P<command>\w+): (?P<title>.+)")


@dataclass(frozen=True)
class Choice:
    """One file of a group. `command` and `title` come from its comment `# anyflow <command>: <title>`, if any."""

    name: str
    command: str | None
    title: str


def find_groups(folders: Sequence[Path]) -> dict[str, dict[str, Choice]]:
    """Map group (`student`, `student/adapter`, ...) -> name -> choice. If folders share a name, the first one wins."""
    groups: dict[str, dict[str, Choice]] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*/*.yaml")):
            group = path.parent.relative_to(folder).as_posix()
            groups.setdefault(group, {}).setdefault(path.stem, _read_choice(path))
    return groups


def groups_of(command: str, groups: dict[str, dict[str, Choice]]) -> dict[str, dict[str, Choice]]:
    """Select the groups of a command: all groups for `train`, only experiments for other commands.

    Other commands can therefore have a plain key with the name of a group, such as `teacher=FOLDER`.
    """
    return groups if command == "train" else {EXPERIMENT: groups.get(EXPERIMENT, {})}


def choices_for(command: str, group: str, choices: dict[str, Choice]) -> dict[str, Choice]:
    """Select the choices that fit a command: all choices, except experiments of other commands."""
    if group != EXPERIMENT:
        return choices
    return {name: choice for name, choice in choices.items() if choice.command in (None, command)}


def _read_choice(path: Path) -> Choice:
    match = _TITLE.match(path.read_text(encoding="utf-8"))
    return Choice(path.stem, match["command"], match["title"]) if match else Choice(path.stem, None, "")
