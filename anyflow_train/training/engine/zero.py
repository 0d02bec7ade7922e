"""The engine for DeepSpeed ZeRO. Only this module imports DeepSpeed and accelerate."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from anyflow_train.config.run import Optimizer as OptimizerConfig
from anyflow_train.errors import UserError
from anyflow_train.files import read_json
from anyflow_train.training.checkpoints.tensor_handle import Entry
from anyflow_train.training.engine.adamw import MOMENTS, adamw, set_rate, start_moments
from anyflow_train.training.engine.types import Outcome
from anyflow_train.training.processes.world import World

Network = TypeVar("Network", bound=nn.Module)


def zero_stage() -> int:
    """The ZeRO stage that `accelerate launch` was given; 0 without DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return 0
    stage = _file_of_launcher().get("stage", "auto")
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") if stage == "auto" else stage)


def engine_name() -> str:
    """Name of the launcher's strategy, as in `launch/` and `anyflow plan`.

    Raises:
        UserError: the user's own DeepSpeed file cannot be read, or offloads to NVMe, which is not supported.
    """
    stage = zero_stage()
    offload = {part: _offload_device(part) for part in ("param", "optimizer")} if stage else {}
    for part, device in offload.items():
        if device == "nvme":
            key = f"zero_optimization.offload_{part}.device"
            raise UserError(
                key, "is nvme, which is not supported; set it to cpu or none in the launcher's DeepSpeed config"
            )
    return f"zero{stage}{'_offload' if stage == 3 and offload['param'] != 'none' else ''}" if stage else "ddp"


def _offload_device(part: str) -> str:
    own = _file_of_launcher().get(f"offload_{part}") or {}
    return own.get("device") or os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")


def _file_of_launcher() -> dict[str, Any]:
    """Read `zero_optimization` of the user's own DeepSpeed file, accelerate's `deepspeed_config_file`, if given."""
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":
        return {}
    try:
        own = {**read_json(Path(path))["zero_optimization"]}
        devices = {dict(own.get(f"offload_{part}") or {}).get("device") for part in ("param", "optimizer")}
        if own.get("stage", "auto") not in ("auto", 0, 1, 2, 3) or not devices <= {None, "none", "cpu", "nvme"}:
            raise ValueError("unknown stage or device")
        return own
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{path} cannot be used ({type(error).__name__}: {error})"
        wanted = 'zero_optimization, whose stage is 0 to 3, and whose offload_... are objects like {"device": "cpu"}'
        raise UserError("deepspeed_config_file", f"{problem}; give a JSON file with {wanted}") from error


def build_sharded(build: Callable[[], Network], read: Callable[[str], Tensor], world: World) -> Network:
    """Build a network in ZeRO-3 shards. No process ever holds more than one whole weight.

    Args:
        build: builds the network, with any weights.
        read: reads a weight by model name; called on rank 0 only, once for each weight.
    """
    deepspeed = _deepspeed(world)
    with deepspeed.zero.Init(config_dict_or_path=_settings(1.0)):
        network = build()
    for name, parameter in network.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if world.is_main:
                parameter.data.copy_(read(name))
    for module in network.modules():  # DeepSpeed moves only the parameters
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(world.device)
    return network


def shard_frozen(network: nn.Module) -> Any:
    """Wrap a network of `build_sharded` that is only called, never trained."""
    return _initialize(network, None, 1.0)


def _initialize(network: nn.Module, optimizer: torch.optim.AdamW | None, clip_norm: float) -> Any:
    """Wrap a network in DeepSpeed's engine, so that the caller's autocast alone decides on bfloat16.

    On a GPU DeepSpeed disables an autocast that its config does not enable. Enabling it there would also affect the
    forwards that must run in float32. So the engine reports the state of the surrounding autocast.
    """
    import deepspeed

    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=_settings(clip_norm))
    accelerator: Any = deepspeed.get_accelerator()
    device = accelerator.device_name()
    engine.torch_autocast_enabled = lambda: torch.is_autocast_enabled(device)
    engine.torch_autocast_dtype = lambda: torch.get_autocast_dtype(device)
    return engine


def _deepspeed(world: World) -> Any:
    """Import DeepSpeed and initialise it on the world's processes.

    Raises:
        UserError: DeepSpeed is not installed, or the process has no launcher.
    """
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)  # read when DeepSpeed is imported
    try:
        import deepspeed
    except ImportError as error:
        problem = "is not installed, but the launcher's strategy is ZeRO; pip install 'anyflow_train[deepspeed]'"
        raise UserError("deepspeed", problem) from error
    if world.size == 1 and "MASTER_ADDR" not in os.environ:
        raise UserError("MASTER_ADDR", "is missing; start with launch/train.sh")
    deepspeed.init_distributed()
    return deepspeed


class ZeroEngine:
    """Engine with DeepSpeed ZeRO 1, 2 or 3. Moments and float32 masters are sharded, in stage 3 the parameters too.

    DeepSpeed skips a step whose gradient is not finite. A loss that is not finite makes the whole gradient NaN, so that
    all processes skip the step or none does. Other watched values do not stop a step. DeepSpeed's own checkpoints
    require the same number of processes; `entries` give whole tensors instead.
    """

    def __init__(
        self, world: World, network: nn.Module, parameters: Mapping[str, Parameter], config: OptimizerConfig
    ) -> None:
        _deepspeed(world)
        self.world = world
        self._parameters: dict[str, Any] = dict(parameters)  # Any: DeepSpeed adds attributes to them
        self._stage = zero_stage()
        self.optimizer: Optimizer = adamw(self._parameters, config)
        self._deepspeed = _initialize(network, self.optimizer, config.clip_norm)
        self.network = self._deepspeed
        self._start_moments()

    def backward(self, loss: Tensor) -> None:
        poison = torch.where(loss.isfinite(), 1.0, math.nan)
        # DeepSpeed averages over the processes, but the sum is required
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
        """Entry of a master. The parameter itself is read; writing also updates DeepSpeed's copy."""
        from deepspeed.utils import safe_set_full_fp32_param

        parameter, entry = self._parameters[name], self.entry(name, shard)

        def write(whole: Tensor) -> None:
            entry.write(whole)
            if self._stage < 3:
                safe_set_full_fp32_param(parameter, whole)
            else:
                # DeepSpeed's function would use the last engine that was created on the network.
                self._deepspeed.optimizer.set_local_hp_param(self._cut(whole, shard), parameter)

        return Entry(entry.shape, entry.read, write)

    def _moment(self, name: str, kind: str) -> Entry:
        """Entry of a moment. It is read and written by DeepSpeed, because reading an offloaded moment gives a copy."""
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
        """Set all gradients to zero. Otherwise DeepSpeed reuses an old gradient if no loss reaches a parameter."""
        optimizer = self._deepspeed.optimizer
        optimizer.grad_partitions_flat_buffer.zero_()
        for master in optimizer.fp32_partitioned_groups_flat:
            if master.grad is not None:  # only if it is offloaded
                master.grad.zero_()

    def _start_moments(self) -> None:
        """Create the moments on DeepSpeed's flat shards of the masters, which replace the optimizer's parameters."""
        optimizer = self._deepspeed.optimizer
        if self._stage < 3:
            start_moments(self.optimizer, optimizer.single_partition_of_fp32_groups)
            optimizer._lazy_init_hp_params_optimizer_state()
            return
        # With float32 shards DeepSpeed should need no separate masters, but its check compares a device with a string.
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
        """Return this process's part of a whole tensor. The last part is padded with zeros."""
        size = shard.numel()
        part = whole.flatten()[self.world.rank * size : (self.world.rank + 1) * size]
        return nn.functional.pad(part, (0, size - part.numel())).view(shard.shape)


def _settings(clip_norm: float) -> dict[str, Any]:
    """Build DeepSpeed's config. Only the stage and the offload come from the launcher, and nothing is `auto`."""
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # required by DeepSpeed, but the loader makes the batches
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # `step` is the boundary, not the n-th `backward`
        "gradient_clipping": clip_norm,
        "zero_allow_untested_optimizer": True,
        # On a CPU torch's fused Adam is as fast as DeepSpeed's, which requires a compiler and two minutes to build.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": plugin.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": 1 << 28,
            "allgather_bucket_size": 1 << 28,
            # Averages are swapped into the shards between forwards, so a gathered parameter must not be kept after its
            # forward or fetched before it.
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
