"""`anyflow check`: the resolved config of a run, what follows from it, and nothing started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from anyflow_train.config.compose import compose
from anyflow_train.config.derived import derive, table, world_size
from anyflow_train.config.rules.run import run_warnings
from anyflow_train.config.run import RunConfig


def run(overrides: Sequence[str], config_dir: Path | None) -> int:
    """Print the config as YAML, derived quantities and warnings as comments, so that the whole output is valid YAML."""
    config: RunConfig = compose("train", overrides, config_dir)
    print(as_yaml(config), end="")
    print("\n# What follows from it:")
    for name, value in table(derive(config, world_size())):
        print(f"#   {name:<14} {value}")
    for finding in run_warnings(config, world_size()):
        print(f"# warning: {finding.error()}")
    return 0


def as_yaml(config: RunConfig) -> str:
    """The config as it can be given back: every key with its value."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
