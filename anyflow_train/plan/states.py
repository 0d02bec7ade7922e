"""Memory that a process keeps for a network, as `training.engine` lays it out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.plan.meter import Moment
from anyflow_train.training.recipe import Recipe

FLOAT = 4
# bitsandbytes: so many numbers share a scale, and a tensor with fewer than `SMALLEST` keeps its moments in float32.
BLOCK, SMALLEST = 256, 4096
# Bytes of `reduce_bucket_size` in `training.engine.zero`. DeepSpeed allocates it in full, however small the network is.
BUCKET = (1 << 28) * FLOAT


class Sizes(NamedTuple):
    """Numbers of parameters of a role's network. A role that uses another role's base counts only what it adds.

    Attributes:
        trained: parameters that are trained.
        adapters: trained parameters of low-rank adapters.
        small: trained parameters in tensors that are too small for moments in 8 bits.
        scales: number of scales of one moment in 8 bits.
        frozen: parameters that are not trained, stored in float32.
        in_bf16: parameters that are not trained, stored in bfloat16.
        in_fp8: parameters that are not trained, stored in 8 bits.
        largest: parameters of the largest tensor.
    """

    trained: int
    adapters: int
    small: int
    scales: int
    frozen: int
    in_bf16: int
    in_fp8: int
    largest: int

    @property
    def parameters(self) -> int:
        """Number of parameters of the network without its adapters."""
        return self.trained - self.adapters + self.not_trained

    @property
    def not_trained(self) -> int:
        """Number of frozen parameters in all dtypes."""
        return self.frozen + self.in_bf16 + self.in_fp8


def network_sizes(recipe: Recipe) -> dict[str, Sizes]:
    """Count the parameters of every network of a recipe, by role, the student first."""
    trained = {role: trainable.engine.shards() for role, trainable in recipe.trainables.items()}
    seen = {id(tensor) for shards in trained.values() for tensor in shards.values()}
    networks = {role: trainable.network for role, trainable in recipe.trainables.items()}
    teacher = recipe.roles.teacher
    if teacher is not None:
        networks["teacher"] = teacher.network if isinstance(teacher, NetworkFlowMap) else networks["student"]
    found = {}
    for role, network in networks.items():
        tensors = {id(parameter): parameter for parameter in network.parameters()}
        frozen = [tensor for key, tensor in tensors.items() if key not in seen]
        seen |= tensors.keys()
        found[role] = _sizes(trained.get(role, {}), frozen)
    return found


def _sizes(trained: dict[str, Tensor], frozen: Iterable[Tensor]) -> Sizes:
    frozen = list(frozen)
    kept: Counter[torch.dtype] = Counter()
    for tensor in frozen:
        kept[tensor.dtype] += tensor.numel()
    sizes = {name: tensor.numel() for name, tensor in trained.items()}
    large = [size for size in sizes.values() if size >= SMALLEST]
    every = [*sizes.values(), *(tensor.numel() for tensor in frozen), 0]
    return Sizes(
        trained=sum(sizes.values()),
        adapters=sum(size for name, size in sizes.items() if ".lora_" in name),
        small=sum(sizes.values()) - sum(large),
        scales=sum(math.ceil(size / BLOCK) for size in large),
        frozen=kept[torch.float32],
        in_bf16=kept[torch.bfloat16],
        in_fp8=kept[torch.float8_e4m3fn],
        largest=max(every),
    )


@dataclass(frozen=True)
class States:
    """Weights, masters, moments, averages and gradients of a role on one process, as `training.engine` cuts them.

    Attributes:
        moments_in_8_bits: whether Adam's moments are kept so.
        strategy: a file of `launch/`.
        world: number of processes.
    """

    role: str
    sizes: Sizes
    moments_in_8_bits: bool
    strategy: str
    world: int

    @property
    def stage(self) -> int:
        return int(self.strategy[4]) if self.strategy.startswith("zero") else 0

    @property
    def offload(self) -> bool:
        return self.strategy.endswith("offload")

    def share(self, numbers: int, from_stage: int) -> int:
        """Bytes on one process of float32 numbers that are cut over the processes from a ZeRO stage on."""
        return FLOAT * (math.ceil(numbers / self.world) if self.stage >= from_stage else numbers)

    @property
    def kept(self) -> tuple[tuple[str, int], ...]:
        """Name and bytes of what stays from step to step, on the GPU or the host.

        At stage 3 there are no masters besides the shards of the weights.
        """
        sizes = self.sizes
        trained = sizes.trained
        in_8_bits = trained - sizes.small if self.moments_in_8_bits else 0
        masters = self.share(trained, 1) if self.stage in (1, 2) else 0
        return (
            ("weights, trained (float32)", self.share(trained, 3)),
            ("weights, frozen (float32)", self.share(sizes.frozen, 3)),
            ("weights, frozen (bfloat16)", self.share(sizes.in_bf16, 3) // 2),
            ("weights, frozen (fp8)", sizes.in_fp8),
            ("masters (float32)", masters),
            ("Adam's moments (float32)", 2 * self.share(trained - in_8_bits, 1)),
            ("Adam's moments (8 bits)", 2 * (in_8_bits + FLOAT * sizes.scales) if in_8_bits else 0),
            ("averages (EMA, float32)", self.share(trained, 3) if self.role == "student" else 0),
        )

    @property
    def on_gpu(self) -> tuple[tuple[str, int], ...]:
        return () if self.offload else self.kept

    @property
    def on_host(self) -> int:
        """Bytes in the host's memory, with two copies of the gradients: their sum, and the optimizer's own."""
        return sum(size for _, size in self.kept) + 2 * self.share(self.sizes.trained, 2) if self.offload else 0

    @property
    def gradients_always(self) -> int:
        """Bytes of gradients that stay while another network is trained: stage 3 never frees them."""
        return self.share(self.sizes.trained, 2) if self.stage == 3 and not self.offload else 0

    def gradients(self, moment: Moment) -> int:
        """Bytes of gradients in a moment of this role's update.

        Under ZeRO 1 and 2 a process holds its share of the sum of earlier gradients, and new gradients besides it.
        Stage 1 keeps the new ones whole until the backward pass ends, stage 2 only their share.
        """
        if self.stage == 0:
            return moment.gradients
        if self.stage == 3:
            return self.gradients_always
        earlier = self.share(self.sizes.trained, 1) if moment.earlier else 0
        return earlier + self.share(round(moment.arrived / FLOAT), 2)

    @property
    def gradients_applied(self) -> int:
        """Bytes of gradients in the optimizer's step, where DeepSpeed makes a flat copy of its share."""
        if self.offload:
            return 0
        return self.share(self.sizes.trained, 1) * (2 if self.stage else 1)

    def buffers(self, backward: bool) -> int:
        """Bytes of the engine's buffers: the bucket, and at stage 3 a gathered layer with its gradient.

        Args:
            backward: whether a backward pass of this role is under way. Stages 1 and 2 free the bucket after it.
        """
        if self.stage == 3:
            return (BUCKET if self.sizes.trained else 0) + 2 * FLOAT * self.sizes.largest
        return BUCKET if self.stage and backward else 0

    @property
    def buffers_always(self) -> int:
        """Bytes of buffers that stay while another network is trained."""
        return BUCKET if self.stage == 3 and self.sizes.trained else 0
