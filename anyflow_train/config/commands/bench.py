"""Keys of `anyflow bench`."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from anyflow_train.config.base import Model
from anyflow_train.config.commands.types import Texts

BenchPart = Literal[
    "machine",
    "agreement",
    "attention",
    "kernels",
    "zero2",
    "zero3",
    "zero3_offload",
    "eager",
    "compiled",
    "full",
    "published",
    "fp8",
    "published_attention",
]


class BenchConfig(Model):
    """`anyflow bench`: check this machine's GPU, and measure steps of the 1.3B model with random weights on it.

    out: folder for the report `bench.md`, all figures `bench.json`, and a log of every part.
    limit: seconds for all parts together; parts that no longer fit are left out. A rehearsal has no such limit.
    only: parts to run, such as [eager,compiled]; an empty list runs all of them.
    rehearse: run all parts at tiny sizes, also on a CPU. Their times mean nothing.
    settings: more arguments of `anyflow train` for the measured steps, such as ["data.height=720","data.width=1280"].
    """

    out: str = "runs/bench"
    limit: PositiveFloat = 540.0
    only: tuple[BenchPart, ...] = ()
    rehearse: bool = False
    settings: Texts = ()
