"""A command's own options beside the keys of a run, on one command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from anyflow_train.config.base import Model
from anyflow_train.config.compose import compose, config_folders
from anyflow_train.config.decode import decode
from anyflow_train.config.groups import find_groups
from anyflow_train.config.overrides import parse
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserErrors

Options = TypeVar("Options", bound=Model)


def compose_beside(
    model: type[Options], overrides: Sequence[str], config_dir: Path | None, world: Callable[[Options], int]
) -> tuple[Options, RunConfig]:
    """The command's own options, and the config of the run on `world(options)` processes.

    Raises:
        UserErrors: of the run's keys and of the command's own, together.
    """
    own, others = split(model, overrides, config_dir)
    options, errors = decode(model, own, lambda _: (), {}, dict)
    try:
        config = compose("train", others, config_dir, None if options is None else world(options))
    except UserErrors as several:
        raise UserErrors([*errors, *several.errors]) from None
    if options is None:
        raise UserErrors(errors)
    return options, config


def split(model: type[Model], overrides: Sequence[str], config_dir: Path | None) -> tuple[dict[str, Any], list[str]]:
    """The values of a command's own keys, and the rest as written.

    A key that is also a group, such as `engine`, is the run's where the value is one of the group's choices.
    """
    groups = find_groups(config_folders(config_dir))
    own: dict[str, Any] = {}
    others: list[str] = []
    for override in overrides:
        settings, _ = parse([override])
        key, text = (settings[0].key, settings[0].text) if settings else ("", "")
        if key in model.model_fields and text not in groups.get(key, {}):
            own[key] = settings[0].value
        else:
            others.append(override)
    return own, others
