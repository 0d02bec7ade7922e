"""Predicts the memory of one GPU when it is fullest.

A dry run gives the activations of every moment; `plan.states` adds what an engine keeps of weights and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from anyflow_train.config.derived import largest, latent_shape
from anyflow_train.config.run import RunConfig
from anyflow_train.plan.dry_run import DryRun
from anyflow_train.plan.meter import BACKWARD, Moment
from anyflow_train.plan.states import FLOAT, States
from anyflow_train.plan.validation import DECODING, decoder_memory, decodes
from anyflow_train.text import GIB

# What the driver, torch's kernels, cuBLAS and NCCL take of a GPU before the first tensor.
CONTEXT = 1 * GIB
# Room between the blocks of torch's allocator.
FRAGMENTATION = 0.05
OPTIMIZER = ", optimizer"


@dataclass(frozen=True)
class Fullest:
    """The moment in which a process holds the most in addition to its state, in bytes."""

    name: str
    gradients: int
    activations: int
    copies: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        """Bytes of the moment, without the state."""
        return self.gradients + self.activations + self.copies + self.buffers


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
    moment: Fullest
    host: int
    assumed: int

    @property
    def parts(self) -> list[tuple[str, int]]:
        """Name and bytes of everything that is held; their sum is `total`."""
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
        """Bytes of all tensors and of the allowance."""
        return sum(size for _, size in self.parts)


def plan_memory(config: RunConfig, found: DryRun, strategy: str, world: int) -> Memory:
    """Memory of each of `world` processes.

    Args:
        config: one that its rules accept.
        found: dry run of the config.
        strategy: a file of `launch/`: single, ddp, zero1, zero2, zero3 or zero3_offload.
    """
    in_8_bits = config.optimizer.moments == "8bit"
    states = {role: States(role, sizes, in_8_bits, strategy, world) for role, sizes in found.sizes.items()}
    labels = {role: "" if role == "student" else f"{role}: " for role in states}
    kept = [(labels[role] + name, size) for role, state in states.items() for name, size in state.on_gpu]
    moments = [_held(config, name, moment, states) for name, moment in found.moments]
    if decodes(config):
        moments.append(_held(config, DECODING, decoder_memory(config), states))
    host = sum(state.on_host for state in states.values())
    assumed = sum(size for role in found.assumed for _, size in states[role].on_gpu)
    return Memory(tuple(kept), max(moments, key=lambda moment: moment.total), host, assumed)


def _held(config: RunConfig, part: str, moment: Moment, states: Mapping[str, States]) -> Fullest:
    """Memory of one moment, with the gradients and buffers that the engine holds at that time.

    Args:
        part: where in the step the moment is, such as `student, backward`.
    """
    role = part.partition(",")[0]
    own = states.get(role, states["student"])  # a part that names no role, such as validation, counts as the student's
    others = [state for state in states.values() if state is not own]
    backward = part.endswith(BACKWARD)
    gradients = own.gradients_applied if part.endswith(OPTIMIZER) else own.gradients(moment)
    return Fullest(
        part,
        gradients + sum(other.gradients_always for other in others),
        _split(config, moment.activations),
        moment.copies,
        own.buffers(backward) + sum(other.buffers_always for other in others),
    )


def _split(config: RunConfig, activations: int) -> int:
    """Bytes of activations on one of the processes that share a sample. The latents and texts are not shared out."""
    engine, data = config.engine, config.data
    whole = math.prod(latent_shape(largest(data), config.student.architecture.in_channels))
    whole += max(data.text_lengths) * config.student.architecture.text_dim
    held = min(FLOAT * engine.micro_batch * whole, activations)
    return held + math.ceil((activations - held) / engine.sequence_parallel)
