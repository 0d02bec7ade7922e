"""`anyflow evaluate`: by one metric or another."""

from __future__ import annotations

from anyflow_train.config.commands import EvaluateConfig


def run(config: EvaluateConfig) -> None:
    """Evaluate, see `evaluation.evaluate` and `evaluation.vbench`.

    Raises:
        UserError: something that the metric needs is missing.
    """
    if config.metric == "vbench":
        from anyflow_train.evaluation.vbench import command

        command.run(config)
    else:
        from anyflow_train.evaluation import evaluate

        evaluate.run(config)
