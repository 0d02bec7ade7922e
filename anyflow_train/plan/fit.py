"""Searches the nearest setting that fits: tries everything that can be changed, the smallest change first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from anyflow_train.config.network import Checkpointing
from anyflow_train.config.rules.run import run_errors
from anyflow_train.config.run import RunConfig
from anyflow_train.plan.dry_run import DryRun, dry_run_memory
from anyflow_train.plan.memory import Memory, plan_memory
from anyflow_train.training.start_checks import refused_under

# How large a change is. A smaller micro-batch and checkpointing cost time only, ZeRO also communication; offloading
# costs much of both; LoRA trains something else.
HALF_THE_BATCH = 2
CHECKPOINTING: dict[Checkpointing, int] = {"none": 0, "selective": 3, "block": 6}
STRATEGIES = {"ddp": 0, "zero1": 4, "zero2": 6, "zero3": 8, "zero3_offload": 18}
SEQUENCE_PARALLEL = {1: 0, 2: 10, 4: 14, 8: 18}
LORA = 32
KEYS = ("strategy", "engine.micro_batch", "student.gradient_checkpointing", "engine.sequence_parallel")


@dataclass(frozen=True)
class Setting:
    """A run as it could be: its config, its strategy, and the arguments that lead there."""

    config: RunConfig
    strategy: str
    changes: tuple[str, ...]
    size: int


def nearest_fit(
    config: RunConfig, lora: RunConfig | None, strategy: str, world: int, limit: float, planned: DryRun
) -> tuple[Setting, Memory] | None:
    """Find the smallest change after which a process needs at most `limit` bytes; None where nothing helps.

    Settings that look the same to a dry run share one.

    Args:
        lora: the same run with adapters in place of full training; None where it has adapters, or cannot.
        planned: dry run of `config` as it is.
    """
    runs = {_as_dry_run_sees(config): planned}
    for setting in settings(config, lora, strategy, world):
        seen = _as_dry_run_sees(setting.config)
        runs[seen] = found = runs.get(seen) or dry_run_memory(setting.config, world, planned.costliest)
        memory = plan_memory(setting.config, found, setting.strategy, world)
        if memory.total <= limit:
            return setting, memory
    return None


def settings(config: RunConfig, lora: RunConfig | None, strategy: str, world: int) -> Iterator[Setting]:
    """Yield the settings that `nearest_fit` tries, without those that the rules refuse, the smallest change first."""
    found = list(_settings(config, strategy, (), 0))
    if lora is not None:
        found += _settings(lora, strategy, ("student/adapter=lora",), LORA)
    for setting in sorted(found, key=lambda setting: setting.size):
        if not run_errors(setting.config, world):
            yield setting


def _settings(config: RunConfig, strategy: str, changes: tuple[str, ...], size: int) -> Iterator[Setting]:
    micro, width = config.engine.micro_batch, config.engine.sequence_parallel
    policy = config.student.gradient_checkpointing
    now = {KEYS[0]: strategy, KEYS[1]: micro, KEYS[2]: policy, KEYS[3]: width}
    sizes = (
        {number: halvings * HALF_THE_BATCH for halvings, number in enumerate(_halves(micro))},
        _larger(CHECKPOINTING, policy),
        _larger(STRATEGIES, strategy),
        _larger(SEQUENCE_PARALLEL, width),
    )
    for choice in product(*(axis.items() for axis in sizes)):
        (micro, policy, other, width), costs = zip(*choice, strict=True)
        refused = {key: value for key, (_, value) in refused_under(config, other).items()}
        wanted = {KEYS[0]: other, **refused, KEYS[1]: micro, KEYS[2]: policy, KEYS[3]: width}
        written = tuple(f"{key}={value}" for key, value in wanted.items() if value != now.get(key))
        yield Setting(_changed(config, wanted), other, changes + written, size + sum(costs))


def _larger(sizes: Mapping[Any, int], now: Any) -> dict[Any, int]:
    """Map the present value to 0, and every value that is a larger change to how much larger it is."""
    found = {value: size - sizes[now] for value, size in sizes.items() if now in sizes and size > sizes[now]}
    return {now: 0} | found


def _as_dry_run_sees(config: RunConfig) -> str:
    """Write the config as text, without the settings that only `plan_memory` looks at."""
    return _changed(config, {"optimizer.moments": "fp32", "engine.sequence_parallel": 1}).model_dump_json()


def _halves(number: int) -> list[int]:
    """List the number, its halves as long as they are whole, and 1."""
    numbers = [number]
    while numbers[-1] % 2 == 0:
        numbers.append(numbers[-1] // 2)
    return numbers if numbers[-1] == 1 else [*numbers, 1]


def _changed(config: RunConfig, values: Mapping[str, object]) -> RunConfig:
    """Copy the config with other values of dotted keys. `strategy` has no dot, and is left out: no config holds it."""
    for key, value in values.items():
        part, _, name = key.partition(".")
        if name:
            config = config.model_copy(update={part: getattr(config, part).model_copy(update={name: value})})
    return config
