"""Keys of `anyflow distil`."""

from __future__ import annotations

from typing import Literal

from anyflow_train.config.base import Model
from anyflow_train.config.commands.types import StrategyName, Texts


class DistilOptions(Model):
    """`anyflow distil`: the whole way from clips to an exported student. The same line resumes it.

    source: folder or list of clips with captions, as for `anyflow prepare`.
    prompts: file of prompts instead of clips; stage 1 then takes its points from noise (objective.source=student).
    held_out: clips that the student is compared with; null leaves out the evaluation.
    out: folder of shards, runs, the exported pipeline, the report, and the page `summary.md`.
    strategy: strategy of `anyflow launch` for the training; null trains in one process.
    prepare, stage1, stage2, export, evaluate: arguments of `anyflow prepare`, of `anyflow train` for both stages, of
        `anyflow export` and of `anyflow evaluate`. An empty stage2 is left out.
    """

    source: str | None = None
    prompts: str | None = None
    held_out: str | None = None
    out: str = "runs/distil"
    strategy: Literal["single", StrategyName] | None = None
    prepare: Texts = ()
    stage1: Texts = ()
    stage2: Texts = ()
    export: Texts = ()
    evaluate: Texts = ()
