"""`anyflow completion SHELL`: completion of commands, keys and choices for bash and zsh."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from anyflow_train.errors import UserError

WORDS = "words"
_BASH = """_anyflow() {
  local IFS=$'\\n' COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
  COMPREPLY=($(anyflow completion words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
  case ${COMPREPLY[0]} in *=) compopt -o nospace ;; esac
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o default -F _anyflow anyflow
"""
SCRIPTS = {"bash": _BASH, "zsh": "autoload -U bashcompinit && bashcompinit\n" + _BASH}


def run(arguments: Sequence[str], config_dir: Path | None) -> int:
    """Print the script of a shell, or what can follow some words.

    Raises:
        UserError: it is no shell that is supported.
    """
    shell, *words = arguments
    if shell == WORDS:
        print("\n".join(candidates(words)))
        return 0
    if shell not in SCRIPTS:
        raise UserError("completion", f"{shell!r} is not supported; valid are {', '.join(SCRIPTS)}")
    print(SCRIPTS[shell], end="")
    return 0


def candidates(words: Sequence[str]) -> Iterator[str]:
    """Iterate over the possible endings of the last word: commands, keys with `=`, or the choices of a group."""
    from anyflow_train.__main__ import COMMANDS

    command, last = (words[0], words[-1]) if words else ("", "")
    if len(words) < 2:
        yield from (name for name in COMMANDS if name.startswith(last))
        return
    from anyflow_train.config.compose import MODELS, config_folders
    from anyflow_train.config.groups import choices_for, find_groups, groups_of
    from anyflow_train.config.help import OF_A_RUN, OPTIONS
    from anyflow_train.config.keys import walk
    from anyflow_train.config.stages import typed_choices

    base = "train" if command in OF_A_RUN else command
    if base not in MODELS:
        return
    groups = groups_of(base, find_groups(config_folders(None)))
    key, equals, _ = last.partition("=")
    if equals:
        found = [
            f"{key}={name}" for name in choices_for(base, key, typed_choices(key, groups) if key in groups else {})
        ]
    else:
        models = [MODELS[base], *([OPTIONS[command]] if command in OPTIONS else [])]
        found = [f"{name}=" for name in (*groups, *(name for model in models for name in walk(model, {})))]
    yield from (text for text in dict.fromkeys(found) if text.startswith(last))
