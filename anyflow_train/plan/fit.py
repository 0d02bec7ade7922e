"""The nearest setting that fits: everything that can be changed, tried from the smallest change on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from anyflow_train.config.network import Checkpointing, FullTraining
from anyflow_train.config.rules.run import run_errors
from anyflow_train.config.run import RunConfig
from anyflow_train.plan.dry_run import DryRun, dry_run_memory
from anyflow_train.plan.memory import Memory, plan_memory

# How large a change is. A smaller micro-batch and checkpointing cost time only, ZeRO also communication; offloading
# costs much of both; LoRA trains something else.
HALF_THE_BATCH = 2
CHECKPOINTING: dict[Checkpointing, int] = {"none": 0, "selective": 3, "block": 6}
STRATEGIES = {"ddp": 0, "zero1": 4, "zero2": 6, "zero3": 8, "zero3_offload": 18}
SEQUENCE_PARALLEL = {1: 0, 2: 10, 4: 14, 8: 18}
LORA = 32


@dataclass(frozen=True)
class Setting:
    """A run as it could be: its config, its strategy, and the arguments that lead there."""

    config: RunConfig
    strategy: str
    changes: tuple[str, ...]
    size: int


def nearest_fit(
    config: RunConfig, lora: RunConfig | None, strategy: str, world: int, limit: float, costliest: int
) -> tuple[Setting, Memory] | None:
    """The smallest change after which a process needs at most `limit` bytes; None where nothing helps.

    Settings that differ in nothing that a dry run sees share one.

    Args:
        lora: the same run with adapters in place of full training; None where it has adapters, or cannot.
        costliest: see `DryRun`.
    """
    runs: dict[str, DryRun] = {}
    for setting in settings(config, lora, strategy, world):
        seen = _as_dry_run_sees(setting.config)
        runs[seen] = found = runs.get(seen) or dry_run_memory(setting.config, world, costliest)
        memory = plan_memory(setting.config, found, setting.strategy, world)
        if memory.total <= limit:
            return setting, memory
    return None


def settings(config: RunConfig, lora: RunConfig | None, strategy: str, world: int) -> Iterator[Setting]:
    """Everything that `nearest_fit` tries and the rules accept, the smallest change first."""
    found = list(_settings(config, strategy, world, ()))
    if lora is not None and isinstance(config.student.adapter, FullTraining):
        found += _settings(lora, strategy, world, ("student/adapter=lora",))
    for setting in sorted(found, key=lambda setting: setting.size):
        if not run_errors(setting.config, world):
            yield setting


def _settings(config: RunConfig, strategy: str, world: int, changes: tuple[str, ...]) -> Iterator[Setting]:
    wanted = config.student.gradient_checkpointing
    base = LORA if changes else 0
    strategies = [name for name in STRATEGIES if STRATEGIES[name] >= STRATEGIES[strategy]]
    parallel = [k for k in SEQUENCE_PARALLEL if k >= config.engine.sequence_parallel and world % k == 0]
    policies: list[Checkpointing] = [
        policy for policy in CHECKPOINTING if CHECKPOINTING[policy] >= CHECKPOINTING[wanted]
    ]
    for micro, checkpointing, other, k in product(_halves(config.engine.micro_batch), policies, strategies, parallel):
        refused = refused_under(config, other)
        written = [
            *([f"strategy={other}"] if other != strategy else []),
            *(f"{key}={value}" for key, value in refused.items()),
            *([f"engine.micro_batch={micro}"] if micro != config.engine.micro_batch else []),
            *([f"student.gradient_checkpointing={checkpointing}"] if checkpointing != wanted else []),
            *([f"engine.sequence_parallel={k}"] if k != config.engine.sequence_parallel else []),
        ]
        halvings = (config.engine.micro_batch // micro).bit_length() - 1
        size = base + halvings * HALF_THE_BATCH + CHECKPOINTING[checkpointing] - CHECKPOINTING[wanted]
        size += STRATEGIES[other] - STRATEGIES[strategy]
        size += SEQUENCE_PARALLEL[k] - SEQUENCE_PARALLEL.get(config.engine.sequence_parallel, 0)
        yield Setting(_changed(config, micro, checkpointing, k, refused), other, (*changes, *written), size)


# Under what else the keys that `refused_under` names are taken.
TAKEN = {"engine.fp8": "ddp to zero2", "optimizer.moments": "ddp"}


def refused_under(config: RunConfig, strategy: str) -> dict[str, str]:
    """Keys that a start under a strategy refuses (`training.start_checks`), and what to set them to."""
    fp8 = {"engine.fp8": "none"} if strategy.startswith("zero3") and config.engine.fp8 != "none" else {}
    moments = (
        {"optimizer.moments": "fp32"} if strategy.startswith("zero") and config.optimizer.moments != "fp32" else {}
    )
    return fp8 | moments


def _as_dry_run_sees(config: RunConfig) -> str:
    """The config without what only `plan_memory` looks at, as text."""
    optimizer = config.optimizer.model_copy(update={"moments": "fp32"})
    engine = config.engine.model_copy(update={"sequence_parallel": 1})
    return config.model_copy(update={"engine": engine, "optimizer": optimizer}).model_dump_json()


def _halves(number: int) -> list[int]:
    """The number, halved as long as it is even, and 1."""
    numbers = [number]
    while numbers[-1] % 2 == 0:
        numbers.append(numbers[-1] // 2)
    return numbers if numbers[-1] == 1 else [*numbers, 1]


def _changed(
    config: RunConfig,
    micro_batch: int,
    checkpointing: Checkpointing,
    sequence_parallel: int,
    refused: Mapping[str, str],
) -> RunConfig:
    changes: dict[str, dict[str, object]] = {
        "engine": {"micro_batch": micro_batch, "sequence_parallel": sequence_parallel},
        "student": {"gradient_checkpointing": checkpointing},
        "optimizer": {},
    }
    for key, value in refused.items():
        part, name = key.split(".")
        changes[part][name] = value
    return config.model_copy(
        update={part: getattr(config, part).model_copy(update=change) for part, change in changes.items()}
    )
