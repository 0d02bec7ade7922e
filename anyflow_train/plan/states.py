"""What a process keeps of a network, as `training.engine` lays it out: float32, but for what is asked for in 8 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from anyflow_train.config.network import Architecture, FullTraining, Lora
from anyflow_train.config.parameters import count_parameters, count_trainable, parameter_shapes, trained_sizes
from anyflow_train.plan.networks import Network

FLOAT = 4
# Of bitsandbytes: numbers that share a scale, and from how many on a tensor's moments are kept in 8 bits.
BLOCK, SMALLEST = 256, 4096
# DeepSpeed's `reduce_bucket_size` in `training.engine.zero`, which is made in full however small the network is.
BUCKET = (1 << 28) * FLOAT


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: `base` without adapters, `adapters`, `trained` of all together, in tensors that are too
    `small` for moments in 8 bits, `scales` of such moments, `largest` weight, and of the base the matrices in blocks.
    """

    base: int
    adapters: int
    trained: int
    small: int
    scales: int
    largest: int
    matrices: int

    @classmethod
    def of(cls, network: Network) -> Sizes:
        """Of one of a run's networks."""
        return _count(network.architecture, network.adapter)  # pyright: ignore[reportArgumentType] # frozen: has a hash

    @property
    def whole(self) -> int:
        """Of the network as it is called."""
        return self.base + self.adapters


@dataclass(frozen=True)
class States:
    """Weights, masters, moments, averages and gradients of a network on one process, as `training.engine` cuts them."""

    network: Network
    engine: str
    world: int

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.network)

    @property
    def stage(self) -> int:
        return int(self.engine[4]) if self.engine.startswith("zero") else 0

    @property
    def offload(self) -> bool:
        return self.engine.endswith("offload")

    def share(self, numbers: int, from_stage: int) -> int:
        """Bytes of float32 numbers that are cut over the processes from a ZeRO stage on."""
        return FLOAT * (math.ceil(numbers / self.world) if self.stage >= from_stage else numbers)

    @property
    def kept(self) -> tuple[tuple[str, int], ...]:
        """What stays from step to step, wherever it is. At stage 3 the shards of the weights are the masters."""
        trained, stored = self.sizes.trained, self.in_fp8 if self.network.fp8 == "stored" else 0
        masters = self.share(trained, 1) if self.stage in (1, 2) else 0
        return (
            ("weights, trained (float32)", self.share(trained, 3)),
            ("weights, frozen (float32)", self.share(self.frozen - stored, 3)),
            ("weights, frozen (fp8)", stored),
            ("masters (float32)", masters),
            ("Adam's moments (float32)", 2 * self.share(trained - self.in_8_bits, 1)),
            ("Adam's moments (8 bits)", 2 * (self.in_8_bits + FLOAT * self.sizes.scales) if self.in_8_bits else 0),
            ("averages (EMA, float32)", self.share(trained, 3) if self.network.averaged else 0),
        )

    @property
    def frozen(self) -> int:
        """Numbers that this network holds and does not train."""
        sizes = self.sizes
        return {"own": sizes.whole - sizes.trained, "lent": sizes.base, "student's": 0}[self.network.base]

    @property
    def in_fp8(self) -> int:
        """Numbers of frozen weights that multiply in 8 bits."""
        return 0 if self.network.fp8 == "none" else self.sizes.matrices

    @property
    def in_8_bits(self) -> int:
        """Numbers whose moments are."""
        return self.sizes.trained - self.sizes.small if self.network.moments == "8bit" else 0

    @property
    def on_gpu(self) -> tuple[tuple[str, int], ...]:
        return () if self.offload else self.kept

    @property
    def on_host(self) -> int:
        """With the gradients, once as they are summed and once as the optimizer takes them."""
        return sum(size for _, size in self.kept) + 2 * self.share(self.sizes.trained, 2) if self.offload else 0

    @property
    def gradients_always(self) -> int:
        """Also while another network is trained: at stage 3 their place is never given back."""
        return self.share(self.sizes.trained, 2) if self.stage == 3 and not self.offload else 0

    def gradients_before(self, backwards: int) -> int:
        """Where the last of an update's `backwards` begins."""
        if self.stage == 3:
            return self.gradients_always
        return self.share(self.sizes.trained, 1) if backwards > 1 else 0

    def gradients_within(self, backwards: int) -> int:
        """In the midst of a backward through several forwards of the network.

        Autograd sums up what a weight gets from all of them, and gives the engine whole gradients, not its shares, when
        the pass comes to the first forward.
        """
        return self.gradients_before(backwards) + FLOAT * self.sizes.trained

    def gradients_after(self, backwards: int) -> int:
        """Where the last ends: under ZeRO 1 and 2 the new gradients come to the sum of the earlier ones."""
        if self.stage in (1, 2):
            return self.gradients_before(backwards) + self.share(self.sizes.trained, 2)
        return self.gradients_before(backwards) if self.stage == 3 else FLOAT * self.sizes.trained

    @property
    def gradients_applied(self) -> int:
        """In the optimizer's step, where DeepSpeed makes a flat copy of its share."""
        if self.offload:
            return 0
        return self.share(self.sizes.trained, 1) * (2 if self.stage else 1)

    @property
    def buffers(self) -> int:
        """In forwards and backwards: the bucket, and at stage 3 a layer that is gathered, with its gradient."""
        if not self.stage:
            return 0
        return BUCKET + (2 * FLOAT * self.sizes.largest if self.stage == 3 else 0)

    @property
    def buffers_always(self) -> int:
        """Also while another network is trained: stages 1 and 2 give their bucket back after a backward."""
        return BUCKET if self.stage == 3 and self.sizes.trained else 0


@cache
def _count(architecture: Architecture, adapter: FullTraining | Lora) -> Sizes:
    """Counted once: the search for what fits asks again and again."""
    base, sizes = count_parameters(architecture), trained_sizes(architecture, adapter)
    trained, small = sum(sizes), sum(size for size in sizes if size < SMALLEST)
    scales = sum(math.ceil(size / BLOCK) for size in sizes if size >= SMALLEST)
    shapes = parameter_shapes(architecture)
    largest = max(math.prod(shape) for shape in shapes.values())
    matrices = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("blocks.") and len(shape) == 2)
    if isinstance(adapter, FullTraining):
        return Sizes(base, 0, trained, small, scales, largest, matrices)
    adapters = count_trainable(architecture, adapter.model_copy(update={"full_modules": ()}))
    return Sizes(base, adapters, trained, small, scales, largest, matrices)
