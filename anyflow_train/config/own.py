"""Find a user's own objective by its name. It is imported only if the user wrote that name.

A name is `my_package.my_module:MyObjective`, found in installed packages, on PYTHONPATH or in the current folder;
or the name of an entry point in the group `anyflow_train.objectives`. Configs that are read from runs, checkpoints and
exports hold a `SavedObjective` instead, and import nothing.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Union

from pydantic import Discriminator, Tag, create_model

from anyflow_train.config.keys import variants
from anyflow_train.config.objective import ObjectiveConfig
from anyflow_train.config.objectives import OURS, OurObjective, SavedObjective, kind_of
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from anyflow_train.text import is_within, nearest_hint

GROUP = "anyflow_train.objectives"
KEY = "objective.kind"
_TARGET = re.compile(r"^(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)$")


def objective_class(config: ObjectiveConfig) -> Any:
    """Return the objective class of a config, ours or the user's own.

    Raises:
        UserError: the config was read from a saved file, which may not import anything.
    """
    if isinstance(config, SavedObjective):
        problem = f"{config.kind!r} is from a saved config, which imports no code; give it on the command line"
        raise UserError(KEY, problem)
    return load_objective(config.kind)


def load_objective(kind: str) -> Any:
    """Import an objective class and check it without calling it.

    Raises:
        UserError: the module or class does not exist, or the class is not an objective.
    """
    if kind in OURS:
        return _imported(OURS[kind])
    entries = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    target = entries.get(kind, kind)
    if not _TARGET.match(target):
        valid = [*OURS, *entries]
        own = "or my_package.my_module:MyObjective for your own objective"
        raise UserError(KEY, f"{kind!r} is wrong: valid are {', '.join(valid)}, {own}{nearest_hint(kind, valid)}")
    found = _imported(target)
    if problem := _not_an_objective(found):
        raise UserError(KEY, f"{kind!r} is not an objective: {problem} (docs/extend.md)")
    return found


def run_model(kind: Any) -> type[RunConfig]:
    """Return the config model of a run with this kind of objective, for a config that a user wrote.

    Raises:
        UserError: the kind does not name an objective.
    """
    own = load_objective(kind).Config if isinstance(kind, str) and kind not in OURS else None
    return _runs(None if own is None else kind, own)


def as_run(config: RunConfig) -> RunConfig:
    """Convert the result of `run_model`'s model to a plain `RunConfig`, the class that the rest of the package uses."""
    return RunConfig.model_construct(_fields_set=config.model_fields_set, **dict(config))


@cache
def _runs(kind: str | None, own: type[ObjectiveConfig] | None) -> type[RunConfig]:
    either: Any = OurObjective
    if own is not None:
        kinds = {**{model.model_fields["kind"].default: model for model in variants(OurObjective)}, str(kind): own}
        tagged = Union[tuple(Annotated[model, Tag(name)] for name, model in kinds.items())]  # noqa: UP007 (a list of types)
        either = Annotated[tagged, Discriminator(kind_of)]
    return create_model("RunConfig", __base__=RunConfig, __doc__=RunConfig.__doc__, objective=(either, ...))


def _imported(target: str) -> Any:
    module_name, _, name = target.partition(":")
    try:
        with _current_folder():
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if is_within(module_name, [missing]):
            where = "install it, add it to PYTHONPATH, or start in its folder"
            raise UserError(KEY, f"module {missing!r} of {target!r} not found; {where}") from error
        raise UserError(KEY, f"{module_name!r} cannot be imported: module {missing!r} not found") from error
    except Exception as error:  # a user's module may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(KEY, f"{module_name!r} cannot be imported: {reason}") from error
    if not hasattr(module, name):
        classes = [known for known, _ in inspect.getmembers(module, inspect.isclass)]
        raise UserError(KEY, f"{module_name!r} has no {name!r}{nearest_hint(name, classes)}")
    return getattr(module, name)


def _not_an_objective(found: Any) -> str | None:
    """Return the reason why `found` is not an objective; None if it is one."""
    if not inspect.isclass(found):
        return "it is not a class"
    config = inspect.getattr_static(found, "Config", None)
    if not (inspect.isclass(config) and issubclass(config, ObjectiveConfig)):
        return "it has no class `Config` that derives from anyflow_train.config.objective.ObjectiveConfig"
    absent = [name for name in ("build", "__call__") if inspect.getattr_static(found, name, None) is None]
    return f"it has no method {absent[0]!r}" if absent else None


@contextmanager
def _current_folder() -> Iterator[None]:
    """Allow imports from the current folder, with the lowest priority."""
    folder = str(Path.cwd())
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
