"""VBench for anyflow_train: videos in its layout, its scores, and one table of them."""

from pathlib import Path

from anyflow_train.config.extensions import Extension
from anyflow_vbench.config import VBenchConfig, rules

COMMAND = Extension(
    summary="measure videos of models with VBench",
    target="anyflow_vbench.command:run",
    model=VBenchConfig,
    rules=rules,
    configs=Path(__file__).with_name("configs"),
)
"""What the entry point `anyflow_train.commands` names."""
