"""Command line -> config. Hydra composes the files of `configs/`; models and rules then report all errors at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from anyflow_train.config.base import Model
from anyflow_train.config.commands import (
    BenchConfig,
    ClipsConfig,
    DemoConfig,
    DistilOptions,
    EvaluateConfig,
    ExportConfig,
    PrepareConfig,
    ReportConfig,
    RunsConfig,
    SampleConfig,
    ShardsConfig,
    SweepOptions,
    WatchConfig,
)
from anyflow_train.config.decode import decode
from anyflow_train.config.derived import world_size
from anyflow_train.config.extensions import Extension, find_extension
from anyflow_train.config.findings import Finding
from anyflow_train.config.foreign_keys import drop_foreign_keys
from anyflow_train.config.groups import config_files, find_groups, groups_of
from anyflow_train.config.overrides import Setting, check, nearest_of, parse, to_hydra
from anyflow_train.config.own import as_run, run_model
from anyflow_train.config.paths import asset, resource
from anyflow_train.config.rules import commands as command_rules
from anyflow_train.config.rules.run import run_errors
from anyflow_train.config.run import RunConfig
from anyflow_train.config.stages import name_experiment
from anyflow_train.errors import ConfigWarning, UserError, raise_all, reason_of

MODELS: dict[str, type[Model]] = {
    "train": RunConfig,
    "prepare": PrepareConfig,
    "clips": ClipsConfig,
    "shards": ShardsConfig,
    "sample": SampleConfig,
    "export": ExportConfig,
    "evaluate": EvaluateConfig,
    "sweep": SweepOptions,
    "runs": RunsConfig,
    "distil": DistilOptions,
    "watch": WatchConfig,
    "report": ReportConfig,
    "demo": DemoConfig,
    "bench": BenchConfig,
}
# Replaces a missing value while the rest is decoded. It is valid as a name, a path and a hub id.
_PLACEHOLDER = "missing"


def compose(command: str, overrides: Sequence[str], config_dir: Path | None = None, world: int | None = None) -> Any:
    """Decode the config of a command.

    Args:
        command: one of `MODELS`, or a command of another package.
        overrides: `group=choice` and `key=value`, as written after the command.
        config_dir: a folder of additional config files with the same layout as `configs/`.
        world: number of processes to check a run for; None uses the launcher's.

    Warns:
        ConfigWarning: keys of the config files were left out, because the chosen kind does not know them.

    Raises:
        UserErrors: every error of the overrides, with dotted keys.
        UserError: Hydra cannot compose a config file, or WORLD_SIZE is impossible.
    """
    extension = None if command in MODELS else find_extension(command)
    model = extension.model if extension else MODELS[command]
    folders = config_folders(config_dir, extension)
    settings, syntax_errors = parse(overrides)
    settings = [replace(setting, key=model.aliases.get(setting.key, setting.key)) for setting in settings]
    every_group = find_groups(folders)
    groups = groups_of(command, every_group)
    settings, stage_errors = name_experiment(settings, groups)
    if [setting.text for setting in settings if setting.key == "evaluation"][-1:] == ["none"]:
        settings = [*parse(["evaluation.every=0"])[0], *settings]  # also if the experiment sets the key
    choice_errors = [*stage_errors, *check(settings, command, groups)]
    refused = {error.where for error in choice_errors}
    accepted = [setting for setting in settings if setting.key not in refused]
    # Hydra takes any name that is also a folder for a group.
    plain = [setting for setting in accepted if setting.key in every_group.keys() - groups.keys()]
    composed = _compose_files(command, to_hydra([item for item in accepted if item not in plain], groups), folders)
    for setting in plain:
        OmegaConf.update(composed, setting.key, setting.value, force_add=True)
    values, known = _plain(composed)
    kind_errors: list[UserError] = []
    if command == "train":
        objective = values.get("objective")
        try:
            model = run_model(objective.get("kind") if isinstance(objective, dict) else None)
        except UserError as error:
            model, kind_errors = run_model(None), [error]
    typed = [item for item in settings if item.key not in groups and item.value == ""]
    empty = [item.key for item in typed if not _may_be_empty(model, item)]
    problem = "is empty, as if from a shell variable that is not set; give a value, or null for none"
    syntax_errors += [UserError(key, problem) for key in empty]
    dropped = list(drop_foreign_keys(model, values, [setting.key for setting in accepted]))
    if choice_errors:
        # A refused group changes the whole config, so only keys that the user typed can be checked.
        written = {setting.key for setting in accepted}
        _, field_errors = decode(model, values, lambda _config: (), {}, dict)
        field_errors = [error for error in field_errors if error.where in written]
        config = None
    else:
        choices = [setting for setting in accepted if setting.key in groups]

        def unchanged() -> dict[str, Any]:
            return _plain(_compose_files(command, to_hydra(choices, groups), folders))[0]

        rules = extension.rules if extension else _rules(command, world, {setting.key for setting in settings})
        config, field_errors = decode(model, values, rules, known, unchanged)
    better = {error.where for error in kind_errors} | set(empty)
    field_errors = [*kind_errors, *(error for error in field_errors if error.where not in better)]
    raise_all([*syntax_errors, *choice_errors, *field_errors])
    for finding in dropped:
        warnings.warn(str(finding.error()), ConfigWarning, stacklevel=2)
    return as_run(config) if isinstance(config, RunConfig) else config


def config_folders(config_dir: Path | None, extension: Extension | None = None) -> list[Path]:
    """List the config folders: that of another package's command, the shipped one, and the user's own.

    Raises:
        UserError: the user's folder does not exist.
        UserErrors: files of the user's folder have the name of a shipped one with another content.
    """
    # Hydra searches only the first folder for the primary config.
    folders = [*([extension.configs] if extension else []), resource("configs")]
    if config_dir is None:
        return folders
    if not config_dir.is_dir():
        raise UserError("--config-dir", f"{str(config_dir)!r} is not a folder")
    problem = "has the name of a shipped config, which would be used instead; give it another name"
    raise_all([UserError(str(path), problem) for path in _shadowed(config_dir, folders)])
    return [*folders, config_dir.resolve()]


def _may_be_empty(model: type[Model], setting: Setting) -> bool:
    """Whether a key holds a text, such as a prompt, that is empty by default."""
    return setting.key in model.model_fields and model.model_fields[setting.key].default == ""


def _shadowed(config_dir: Path, folders: Sequence[Path]) -> Iterator[Path]:
    """Iterate over the user's files that Hydra would not read, except equal copies of shipped files."""
    for path in config_files(config_dir):
        for shipped in (folder / path.relative_to(config_dir) for folder in folders):
            if shipped.is_file() and shipped.read_bytes() != path.read_bytes():
                yield path


def _rules(command: str, world: int | None, typed: set[str]) -> Callable[[Any], Iterable[Finding]]:
    if command == "train":
        return partial(run_errors, world=world_size() if world is None else world)
    return {
        "prepare": partial(command_rules.prepare, typed=typed),
        "sample": command_rules.sample,
        "evaluate": command_rules.evaluate,
        "distil": command_rules.distil,
    }.get(command, lambda _config: ())


def _compose_files(command: str, overrides: list[str], folders: list[Path]) -> DictConfig:
    first, *others = folders
    search = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in others)}]"] if others else []
    OmegaConf.register_new_resolver("asset", asset, replace=True)
    try:
        with initialize_config_dir(config_dir=str(first), job_name="anyflow", version_base="1.3"):
            return hydra_compose(command, overrides=[*overrides, *search])
    except MissingConfigException as error:
        raise _missing_file(error) from error
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError("configs", " ".join(str(error).split())) from error


def _missing_file(error: MissingConfigException) -> UserError:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    return UserError(group or "configs", f"{choice!r} does not exist{nearest_of(choice, list(error.options or ()))}")


def _plain(composed: DictConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Convert to plain nested values. Also return a message for each key without a value (`???`, a bad reference)."""
    known: dict[str, str] = {}
    texts = list(_texts(OmegaConf.to_container(composed, resolve=False)))
    for key, written in texts:
        if written == "???":
            known[key] = f"missing: give {key}=..."
            OmegaConf.update(composed, key, _PLACEHOLDER)
    for key, written in texts:
        if "${" in written and (problem := _unresolvable(composed, key)):
            known[key] = f"{written!r} cannot be resolved: {problem}"
            OmegaConf.update(composed, key, _PLACEHOLDER)
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}, known


def _texts(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Iterate over the dotted key and value of every string."""
    if isinstance(values, str):
        yield prefix, values
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for name, value in entries:
        yield from _texts(value, f"{prefix}.{name}" if prefix else str(name))


def _unresolvable(composed: DictConfig, key: str) -> str | None:
    try:
        OmegaConf.select(composed, key, throw_on_resolution_failure=True)
    except OmegaConfBaseException as error:
        return reason_of(error)
    return None
