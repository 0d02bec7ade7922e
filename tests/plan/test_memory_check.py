"""What is said before a run starts on GPUs that are too small, or not free."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from anyflow_train.config.compose import compose
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from anyflow_train.plan import shortage
from anyflow_train.plan.dry_run import DryRun
from anyflow_train.plan.memory import Memory, plan_memory
from anyflow_train.plan.shortage import foresee, memory_warning
from anyflow_train.text import GIB, duration, memory_size
from anyflow_train.training.memory_check import GpuMemory, check_memory
from anyflow_train.training.processes.world import World

WORLD = 8
# Sizes of the 1.3B network, in a step of few operations: a dry run takes as long as there are operations.
PLAIN = [
    "experiment=wan1_3b_forward",
    "student/adapter=full",
    "objective.guidance=none",
    "objective.guidance_scale=1",
    "evaluation=none",
]


@cache
def plain(world: int = WORLD) -> tuple[RunConfig, DryRun]:
    config = compose("train", PLAIN, None, world)
    return config, shortage.dry_run(config, world)  # the one that tests/plan/conftest.py shares


def planned() -> Memory:
    return plan_memory(*plain(), "ddp", WORLD)


def gpus(free: float, total: float | None = None) -> list[GpuMemory]:
    return [GpuMemory(f"node{rank // 4}", int(free), int(total or free)) for rank in range(WORLD)]


def test_enough_is_enough() -> None:
    needed = planned().total
    assert memory_warning(*plain(), "ddp", gpus(needed)) is None
    assert memory_warning(*plain(), "ddp", gpus(needed - 1)) is not None


def test_one_gpu_that_is_short_is_named_with_what_is_missing_and_what_fits() -> None:
    found = gpus(80 * GIB)
    found[5] = GpuMemory("node1", planned().total - 2 * GIB, 80 * GIB)
    text = memory_warning(*plain(), "ddp", found)
    assert text is not None
    assert "process 5 (node1)" in text
    assert ", 2.00 GiB more than process 5" in text
    assert "free of its 80.00 GiB" in text
    assert text.endswith("engine.micro_batch=1")


def test_only_what_cannot_fit_in_an_empty_gpu_is_an_error() -> None:
    lasting = sum(size for _, size in planned().state)
    assert memory_warning(*plain(), "ddp", gpus(GIB, total=lasting)) is not None
    with pytest.raises(UserError, match=r"GPU memory: .* stay on each GPU .*process 0 \(node0\)"):
        memory_warning(*plain(), "ddp", gpus(80 * GIB, total=lasting - 1))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], World]:
    """A process on a GPU with so much memory."""

    def pretend(free: float, total: float) -> World:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(total)))
        return World(torch.device("cuda", 0))

    return pretend


def test_a_start_warns_once_and_knows_its_work(gpu: Callable[..., World], capsys: pytest.CaptureFixture[str]) -> None:
    config, found = plain(1)
    forecast = check_memory(config, gpu(80 * GIB, 80 * GIB), foresee)
    assert forecast is not None
    assert forecast.work == (found.work,)
    memory = f"{memory_size(plan_memory(config, found, 'ddp', 1).total)} on each GPU (planned)"
    at_peak = [count / (66.9e12 if work.dtype == torch.float32 else 989e12) for work, count in found.operations.items()]
    seconds = config.steps * sum(at_peak) / 0.4
    in_time = f"about {duration(seconds)} for {config.steps} steps, at 40% of the peak"
    assert forecast.rows(config, "NVIDIA H200", 1) == [("memory", memory), ("time", in_time)]
    assert forecast.rows(config, "a new GPU", 1) == [("memory", memory)]
    assert found.work > 1e15
    assert capsys.readouterr().err == ""
    check_memory(config, gpu(20 * GIB, 80 * GIB), foresee)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: GPU memory may not suffice: ")
    assert "ddp on 1" in warning
    assert warning.count("\n") == 1


def test_the_launchers_engine_is_planned(
    gpu: Callable[..., World], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    # Foreseen anew: a dry run inside of a ZeRO-3 launch builds whole networks.
    check_memory(plain(1)[0], gpu(2 * GIB, 80 * GIB), foresee)
    assert "(zero3 on 1)" in capsys.readouterr().err


def test_a_cpu_is_not_asked() -> None:
    assert check_memory(plain(1)[0], World(torch.device("cpu")), foresee) is None
