"""What one GPU holds when a step is at its fullest, from the shapes of what this package's code really keeps."""

from __future__ import annotations

from dataclasses import dataclass

from anyflow_train.config.derived import derive
from anyflow_train.config.objective import FlowMap
from anyflow_train.config.run import RunConfig
from anyflow_train.plan.activations import Activations
from anyflow_train.plan.states import FLOAT, States

GIB = 1 << 30
# What the driver, torch's kernels, cuBLAS and NCCL take of a GPU before the first tensor.
CONTEXT = 1 * GIB
# Room between the blocks of torch's allocator.
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Moment:
    """What a process holds beside its state in one moment of a step, in bytes."""

    name: str
    gradients: int
    activations: int
    copies: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        """Bytes."""
        return self.gradients + self.activations + self.copies + self.buffers


@dataclass(frozen=True)
class Memory:
    """Memory of one process.

    Attributes:
        state: name and bytes of what stays on the GPU from step to step.
        moment: the fullest one.
        host: bytes in the host's memory.
    """

    state: tuple[tuple[str, int], ...]
    moment: Moment
    host: int

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
    states = States(config, engine, world)
    moments = _moments(config, states, Activations(config, derive(config, world)))
    return Memory(states.on_gpu, max(moments, key=lambda moment: moment.total), states.on_host)


def _moments(config: RunConfig, states: States, activations: Activations) -> list[Moment]:
    """The moments of a step's last micro-batch that can be the fullest."""
    accumulation, layers = activations.derived.accumulation, config.student.architecture.num_layers
    before, after = states.gradients_before(accumulation), states.gradients_after(accumulation)
    buffers, rest, working = states.buffers, activations.rest, activations.working(activations.size)
    checkpointing = config.student.gradient_checkpointing
    kept = layers * (activations.block_input if checkpointing else activations.block)
    recomputed = activations.block if checkpointing else 0
    # Autocast keeps its copies of trained weights until a forward ends, and a graph keeps all that it multiplied with.
    cached = 2 * states.sizes.trained if activations.half else 0
    in_graph = 2 * states.sizes.whole if activations.half else 0
    in_block = in_graph // layers
    graph = in_block if checkpointing else in_graph
    held = max(cached, graph) if activations.half else 0
    lasting = buffers if states.stage == 3 else 0  # stages 1 and 2 give their bucket back after a backward
    moments = [
        Moment("forward", before, kept + working + rest, held, lasting),
        Moment("backward begins", before, kept + recomputed + working + rest, graph, buffers),
        Moment("backward ends", after, activations.block + working + rest, in_block, buffers),
        Moment("optimizer", states.gradients_applied, rest, 0, lasting),
    ]
    if isinstance(config.objective, FlowMap):
        half = config.objective.derivative_precision == "bf16"
        size = 2 if half else FLOAT
        wide = activations.working(size) + activations.unit * activations.width * (3 * size)
        moments.append(Moment("difference forward", before, wide + rest, cached if half else 0, lasting))
    return moments
