"""DeepSpeed ZeRO as an engine: the only module that imports DeepSpeed and accelerate."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from anyflow_train.config.run import Optimizer as OptimizerConfig
from anyflow_train.errors import UserError
from anyflow_train.training.checkpoints.tensor_handle import Entry
from anyflow_train.training.engine.adamw import MOMENTS, adamw, set_rate, start_moments
from anyflow_train.training.engine.types import Outcome
from anyflow_train.training.processes.world import World

Network = TypeVar("Network", bound=nn.Module)


def zero_stage() -> int:
    """The ZeRO stage that `accelerate launch` was given; 0 without DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return 0
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def engine_name() -> str:
    """The file of `launch/` that the processes were started with, as `anyflow plan` names it."""
    stage = zero_stage()
    offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none") != "none"
    return f"zero{stage}{'_offload' if stage == 3 and offload else ''}" if stage else "ddp"


def build_sharded(build: Callable[[], Network], read: Callable[[str], Tensor], world: World) -> Network:
    """A network that is cut into shards while it is made (ZeRO-3): no process ever holds more than one whole weight.

    Args:
        build: makes the network, with any weights.
        read: gives a weight by model name; asked on rank 0 only, once for each.
    """
    deepspeed = _deepspeed(world)
    with deepspeed.zero.Init(config_dict_or_path=_settings(1.0)):
        network = build()
    for name, parameter in network.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if world.is_main:
                parameter.data.copy_(read(name))
    return network


def shard_frozen(network: nn.Module) -> Any:
    """A network of `build_sharded` that is only called, never trained."""
    return _initialize(network, None, 1.0)


def _initialize(network: nn.Module, optimizer: torch.optim.AdamW | None, clip_norm: float) -> Any:
    """DeepSpeed's engine around a network; whether its products run in bfloat16 is the caller's autocast alone.

    On a GPU DeepSpeed ends an autocast that its own config does not ask for. One that the config asked for would reach
    the forwards that must be float32. So it is told what is so around it.
    """
    import deepspeed

    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=_settings(clip_norm))
    accelerator: Any = deepspeed.get_accelerator()
    device = accelerator.device_name()
    engine.torch_autocast_enabled = lambda: torch.is_autocast_enabled(device)
    engine.torch_autocast_dtype = lambda: torch.get_autocast_dtype(device)
    return engine


def _deepspeed(world: World) -> Any:
    """DeepSpeed, on the processes that the world has joined."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)  # read when DeepSpeed is imported
    try:
        import deepspeed
    except ImportError as error:
        problem = "is missing, but the launcher asks for ZeRO; pip install 'anyflow_train[deepspeed]'"
        raise UserError("deepspeed", problem) from error
    if world.size == 1 and "MASTER_ADDR" not in os.environ:
        raise UserError("MASTER_ADDR", "is missing; start with launch/train.sh")
    deepspeed.init_distributed()
    return deepspeed


class ZeroEngine:
    """DeepSpeed ZeRO 1, 2 or 3, in float32: masters and moments are sharded, at stage 3 the parameters too.

    DeepSpeed's own step decides on the gradient; a loss that is not finite poisons the whole gradient, so that a step
    is skipped on all processes or on none; what else is watched stops no step here. Its checkpoints fit one world size
    only; `entries` give the whole tensors.
    """

    def __init__(
        self, world: World, network: nn.Module, parameters: Mapping[str, Parameter], config: OptimizerConfig
    ) -> None:
        _deepspeed(world)
        self.world = world
        self._parameters: dict[str, Any] = dict(parameters)  # Any: DeepSpeed hangs its own attributes on them
        self._stage = zero_stage()
        self.optimizer: Optimizer = adamw(self._parameters, config)
        self._deepspeed = _initialize(network, self.optimizer, config.clip_norm)
        self.network = self._deepspeed
        self._start_moments()

    def backward(self, loss: Tensor) -> None:
        poison = torch.where(loss.isfinite(), 1.0, math.nan)
        # DeepSpeed means over all processes, where the sum is wanted
        self._deepspeed.backward(loss * poison * self.world.size, scale_wrt_gas=False)

    def step(self, learning_rate: float, watched: Tensor) -> Outcome:
        values = self.world.all_reduce_sum(watched).tolist()
        set_rate(self.optimizer, learning_rate)
        self._deepspeed.step()
        if self._stage == 3:
            self._forget_gradients()
        return Outcome(
            self._deepspeed.was_step_applied(), float(self._deepspeed.get_global_grad_norm() or 0.0), tuple(values)
        )

    def shards(self) -> dict[str, Tensor]:
        if self._stage < 3:
            return dict(self._parameters)
        return {name: parameter.ds_tensor for name, parameter in self._parameters.items()}

    def entry(self, name: str, shard: Tensor) -> Entry:
        if self._stage < 3:
            return Entry.of(shard)
        shape = self._parameters[name].ds_shape
        return Entry(shape, lambda: self._join(shape, shard), lambda whole: shard.copy_(self._cut(whole, shard)))

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("weights", *MOMENTS)

    def entries(self, kind: str) -> dict[str, Entry]:
        if kind == "weights":
            return {name: self._weight(name, shard) for name, shard in self.shards().items()}
        return {name: self._moment(name, kind) for name in self._parameters}

    def _weight(self, name: str, shard: Tensor) -> Entry:
        """The parameter is float32, so it is its own master; writing must reach DeepSpeed's copy too."""
        from deepspeed.utils import safe_set_full_fp32_param

        parameter, entry = self._parameters[name], self.entry(name, shard)

        def write(whole: Tensor) -> None:
            entry.write(whole)
            if self._stage < 3:
                safe_set_full_fp32_param(parameter, whole)
            else:
                # Not through DeepSpeed's own function: the last engine on a network claims every parameter.
                self._deepspeed.optimizer.set_local_hp_param(self._cut(whole, shard), parameter)

        return Entry(entry.shape, entry.read, write)

    def _moment(self, name: str, kind: str) -> Entry:
        """DeepSpeed is asked when a moment is read, and told what is written: of a moment in the host's memory it gives
        a copy on the GPU.
        """
        from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

        parameter = self._parameters[name]
        if self._stage < 3:
            read: Callable[[], Any] = lambda: safe_get_full_optimizer_state(parameter, kind)  # noqa: E731 (never None)
            return Entry(parameter.shape, read, lambda whole: safe_set_full_optimizer_state(parameter, whole, kind))
        shape, shard, optimizer = parameter.ds_shape, parameter.ds_tensor, self._deepspeed.optimizer
        return Entry(
            shape,
            lambda: self._join(shape, optimizer.get_local_fp32_param(parameter, kind)),
            lambda whole: optimizer.set_local_hp_param(self._cut(whole, shard), parameter, kind),
        )

    def _forget_gradients(self) -> None:
        """Of a parameter that no loss of a step reaches, DeepSpeed would take an earlier step's gradient once more."""
        optimizer = self._deepspeed.optimizer
        optimizer.grad_partitions_flat_buffer.zero_()
        for master in optimizer.fp32_partitioned_groups_flat:
            if master.grad is not None:  # where it is offloaded
                master.grad.zero_()

    def _start_moments(self) -> None:
        """DeepSpeed moves the optimizer onto flat shards of the masters; its moments start there."""
        optimizer = self._deepspeed.optimizer
        if self._stage < 3:
            start_moments(self.optimizer, optimizer.single_partition_of_fp32_groups)
            optimizer._lazy_init_hp_params_optimizer_state()
            return
        # DeepSpeed means to keep no masters beside shards that are float32, but compares their device with its name.
        for master, shards in zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True
        ):
            if (master.device, master.dtype) == (shards.device, shards.dtype):
                master.data = shards
        start_moments(self.optimizer, optimizer.fp32_partitioned_groups_flat)

    def _join(self, shape: torch.Size, shard: Tensor) -> Tensor:
        whole = torch.empty(self.world.size * shard.numel(), dtype=shard.dtype, device=self.world.device)
        dist.all_gather_into_tensor(whole, shard.detach().to(self.world.device).flatten())
        return whole[: shape.numel()].view(shape)

    def _cut(self, whole: Tensor, shard: Tensor) -> Tensor:
        """This process's part of a whole tensor; the last part is filled up with zeros."""
        size = shard.numel()
        part = whole.flatten()[self.world.rank * size : (self.world.rank + 1) * size]
        return nn.functional.pad(part, (0, size - part.numel())).view(shard.shape)


def _settings(clip_norm: float) -> dict[str, Any]:
    """DeepSpeed's config. Stage and offload are the launcher's; nothing else is, and nothing is `auto`."""
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only counted, never used: the loader makes the batches
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # `step` is the boundary, not the n-th `backward`
        "gradient_clipping": clip_norm,
        "zero_allow_untested_optimizer": True,
        # Offloaded, torch's own fused Adam is as fast on a CPU as DeepSpeed's, which takes a compiler and two minutes.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": plugin.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": 1 << 28,
            "allgather_bucket_size": 1 << 28,
            # Averages are swapped into the shards between forwards: no whole parameter may outlive its own forward, and
            # none may be fetched ahead of it.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        },
    }
    for part in ("optimizer", "param"):
        device = getattr(plugin, f"offload_{part}_device")
        if device not in (None, "none"):
            settings["zero_optimization"][f"offload_{part}"] = {"device": device, "pin_memory": True}
    return settings
