"""`anyflow train`: a run, with validation."""

from __future__ import annotations

import torch

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from anyflow_train.evaluation.validation import build_validator
from anyflow_train.training import trainer


def run(config: RunConfig) -> None:
    """Train, or continue, the run of `config`.

    Raises:
        UserError: the run cannot start, continue, or go on; a GPU without enough memory included.
    """
    try:
        trainer.run(config, build_validator)
    except torch.OutOfMemoryError as error:
        sizes = f"engine.micro_batch={config.engine.micro_batch}"
        advice = "use a smaller engine.micro_batch, or student.gradient_checkpointing=true"
        raise UserError(
            "engine.micro_batch", f"the GPU has too little memory for {sizes}; {advice} ({error})"
        ) from error
