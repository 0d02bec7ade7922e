"""Commands of other packages: `anyflow` finds them by the entry point `anyflow_train.commands`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflow_train.errors import UserError

if TYPE_CHECKING:  # `anyflow --help` starts without pydantic
    from anyflow_train.config.base import Model
    from anyflow_train.config.findings import Finding

GROUP = "anyflow_train.commands"


@dataclass(frozen=True)
class Extension:
    """A command of another package and its config. The module that defines it must not import torch.

    Attributes:
        summary: one line for `anyflow --help`.
        target: `module:function`, imported and called with the decoded config only when the command runs.
        model: config model with the command's keys.
        rules: function that returns the findings of a decoded config.
        configs: folder with `<command>.yaml` (Hydra's primary config) and experiments in `experiment/`.
    """

    summary: str
    target: str
    model: type[Model]
    rules: Callable[[Any], Iterable[Finding]]
    configs: Path


def find_extensions() -> dict[str, Extension]:
    """Find every installed command of other packages, by name.

    Raises:
        UserError: the package of a command cannot be imported.
    """
    return {point.name: extension for point in entry_points(group=GROUP) if (extension := find_extension(point.name))}


def find_extension(name: str) -> Extension | None:
    """Find the command with this name; None if no installed package has it.

    Raises:
        UserError: the package of the command cannot be imported.
    """
    for point in entry_points(group=GROUP, name=name):
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            raise UserError(name, f"cannot be loaded from {point.value}: {error}; reinstall the package") from error
    return None
