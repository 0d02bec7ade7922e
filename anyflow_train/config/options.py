"""Command lines that mix a command's own options with the keys of a run."""

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
    """Decode the command's own options, and the config of the run for `world(options)` processes.

    Raises:
        UserErrors: all errors of the run's keys and of the command's own keys.
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
    """Split the overrides into the values of the command's own keys, and the rest as written.

    A key that is also a group, such as `engine`, belongs to the run if the value is one of the group's choices.
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
