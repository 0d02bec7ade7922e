"""Groups in the config folders, their choices, and the command of each experiment."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anyflow_train.errors import UserError

EXPERIMENT = "experiment"
_GLOBAL = re.compile(r"^#\s*@package\s+_global_\s*$", re.MULTILINE)
# A comment before the first key.
_TITLE = re.compile(r"(#.*\n)*?# anyflow (?P<command>\w+): (?P<title>.+)")


@dataclass(frozen=True)
class Choice:
    """One file of a group.

    command, title: from its comment `# anyflow <command>: <title>`, if any.
    path: the file.
    is_global: whether it has the line `# @package _global_`, so that its keys are keys of the whole config.
    """

    name: str
    command: str | None
    title: str
    path: Path
    is_global: bool


def find_groups(folders: Sequence[Path]) -> dict[str, dict[str, Choice]]:
    """Map group (`student`, `student/adapter`, ...) -> name -> choice. If folders share a name, the first one wins."""
    groups: dict[str, dict[str, Choice]] = {}
    for folder in folders:
        for path in config_files(folder):
            group = path.parent.relative_to(folder).as_posix()
            if group == ".":
                continue  # the primary config of a command
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


def config_files(folder: Path) -> list[Path]:
    """List the YAML files of a config folder. Hidden files, such as an editor's lock files, are left out."""
    found = folder.rglob("*.yaml")
    return sorted(
        path
        for path in found
        if (path.is_file() or path.is_symlink()) and not any(part[0] == "." for part in path.relative_to(folder).parts)
    )


def _read_choice(path: Path) -> Choice:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read ({error}); correct or remove this config file") from None
    match = _TITLE.match(text)
    command, title = (match["command"], match["title"]) if match else (None, "")
    return Choice(path.stem, command, title, path, _GLOBAL.search(text) is not None)
