"""Keys of `anyflow sweep`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt

from anyflow_train.config.base import Model


class SweepOptions(Model):
    """Keys of `anyflow sweep`, in addition to the keys of its runs.

    train: arguments of `anyflow train` for all runs, before those of the command line; `key=a,b` runs each value.
    arms: name of a variant -> its arguments of `anyflow train`. Every variant runs with every combination of values.
    equal_operations: set the steps of every run, so that all take as many operations as the first one.
    jobs: runs at a time; null starts one per GPU, or one if there is no GPU. Up to the number of GPUs, each run has one
        for itself.
    evaluate: arguments of `anyflow evaluate` for all runs together, such as experiment=tiny_evaluate. The sweep then
        ends with a table and a plot of all variants, over all seeds. Empty leaves it out.
    sampler: grid (every combination), or tpe (Optuna searches the values; runs whose validation is behind are ended).
    trials: number of runs with sampler=tpe.
    cluster: none, slurm (one job per run, through submitit), or local (the same with processes of this machine).
    slurm: parameters of submitit, such as timeout_min, gpus_per_node and slurm_partition.
    """

    aliases: ClassVar[Mapping[str, str]] = {"sweep.sampler": "sampler", "sweep.trials": "trials"}

    train: tuple[str, ...] = ()
    arms: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    equal_operations: bool = False
    jobs: PositiveInt | None = None
    evaluate: tuple[str, ...] = ()
    sampler: Literal["grid", "tpe"] = "grid"
    trials: PositiveInt = 20
    cluster: Literal["none", "slurm", "local"] = "none"
    slurm: dict[str, str | int | float] = Field(default_factory=dict)
