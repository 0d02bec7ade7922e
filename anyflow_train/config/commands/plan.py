"""Keys of `anyflow plan`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt

from anyflow_train.config.base import Model
from anyflow_train.config.commands.types import GpuName, StrategyName


class PlanOptions(Model):
    """Keys of `anyflow plan`, in addition to the keys of a run.

    gpus: GPUs per node.
    nodes: number of nodes.
    gpu: GPU model, with its memory in GB.
    strategy: file of `launch/` that starts the run; it decides how tensors are distributed over the GPUs.
    utilisation: share of the GPU's peak that matrix products reach over a whole step, including recomputation.
    price: price of one GPU for one hour, in any currency; null leaves out the cost.
    """

    gpus: PositiveInt = 8
    nodes: PositiveInt = 1
    gpu: GpuName = "h100-80"
    strategy: StrategyName = "ddp"
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.4
    price: NonNegativeFloat | None = None

    @property
    def world(self) -> int:
        """Number of processes: one for each GPU."""
        return self.gpus * self.nodes
