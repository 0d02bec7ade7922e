"""VBench for anyflow_train: write videos in VBench's layout, score them, and write a table."""

from pathlib import Path

from anyflow_train.config.extensions import Extension
from anyflow_vbench.config import VBenchConfig, rules

COMMAND = Extension(
    summary="score videos of models with VBench",
    target="anyflow_vbench.command:run",
    model=VBenchConfig,
    rules=rules,
    configs=Path(__file__).with_name("configs"),
)
"""Target of the entry point in the group `anyflow_train.commands`."""
