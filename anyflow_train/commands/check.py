"""`anyflow check`: print the resolved config of a run and its derived quantities, without starting it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from anyflow_train.commands.preflight import check_files
from anyflow_train.commands.quiet import silence_loading_bars
from anyflow_train.config.commands import CheckOptions
from anyflow_train.config.derived import table, world_size
from anyflow_train.config.options import compose_beside
from anyflow_train.config.rules.run import run_warnings
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import raise_all


def run(overrides: Sequence[str], config_dir: Path | None) -> int:
    """Print the config as YAML, and derived quantities and warnings as comments. The whole output is valid YAML.

    Raises:
        UserErrors: all errors of the run's keys and of the command's own keys, or of the files that the run opens.
    """
    options, config = compose_beside(CheckOptions, overrides, config_dir, lambda _: world_size())
    files = check_files(config)
    raise_all(files.errors)
    print(as_yaml(config), end="")
    print("\n# Derived quantities:")
    for name, value in table(config, world_size()):
        print(f"#   {name:<14} {value}")
    for finding in run_warnings(config, world_size()):
        print(f"# warning: {finding.error()}")
    for warning in files.warnings:
        print(f"# note: {warning}")
    if options.derivative:
        # Imported here, because it imports torch, which a plain check does not need.
        from anyflow_train.commands.derivative import measure

        silence_loading_bars()
        print(f"\n# Relative error of the time derivative, {options.derivative_samples} samples:")
        print("".join(f"#   {line}\n" for line in measure(config, options).splitlines()), end="")
    return 0


def as_yaml(config: RunConfig) -> str:
    """Format the config as YAML with every key, so that it can be used as a config file."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
