"""What one GPU holds when a step is at its fullest, from the shapes of what this package's code really keeps."""

from __future__ import annotations

from dataclasses import dataclass

from anyflow_train.config.derived import derive
from anyflow_train.config.run import RunConfig
from anyflow_train.plan.moments import Moment, update_moments
from anyflow_train.plan.networks import run_networks
from anyflow_train.plan.states import States

GIB = 1 << 30
# What the driver, torch's kernels, cuBLAS and NCCL take of a GPU before the first tensor.
CONTEXT = 1 * GIB
# Room between the blocks of torch's allocator.
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Memory:
    """Memory of one process.

    Attributes:
        state: name and bytes of what stays on the GPU from step to step.
        moment: the fullest one.
        host: bytes in the host's memory.
        assumed: bytes of `state` that belong to networks whose size is only assumed.
    """

    state: tuple[tuple[str, int], ...]
    moment: Moment
    host: int
    assumed: int

    @property
    def parts(self) -> list[tuple[str, int]]:
        """Name and bytes; their sum is `total`."""
        moment = (
            ("gradients", self.moment.gradients),
            (f"activations ({self.moment.name})", self.moment.activations),
            ("bfloat16 copies of weights (autocast)", self.moment.copies),
            ("engine's buffers", self.moment.buffers),
        )
        allowance = round(FRAGMENTATION * self.tensors) + CONTEXT
        parts = [*self.state, *moment, ("CUDA, NCCL and fragmentation (allowance)", allowance)]
        return [(name, size) for name, size in parts if size]

    @property
    def tensors(self) -> int:
        """Bytes of all tensors."""
        return sum(size for _, size in self.state) + self.moment.total

    @property
    def total(self) -> int:
        """Bytes, with the allowance."""
        return sum(size for _, size in self.parts)


def plan_memory(config: RunConfig, engine: str, world: int) -> Memory:
    """Memory of each of `world` processes.

    Args:
        config: one that its rules accept.
        engine: a file of `launch/`: single, ddp, zero1, zero2, zero3 or zero3_offload.
    """
    states = [States(network, engine, world) for network in run_networks(config)]
    moments = update_moments(config, states, derive(config, world))
    kept = tuple((_of(state, name), size) for state in states for name, size in state.on_gpu)
    host = sum(state.on_host for state in states)
    assumed = sum(size for state in states if state.network.assumed for _, size in state.on_gpu)
    return Memory(kept, max(moments, key=lambda moment: moment.total), host, assumed)


def _of(states: States, name: str) -> str:
    role = states.network.role
    return name if role == "student" else f"{role}: {name}"
