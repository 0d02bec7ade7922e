"""What is said before a run starts on GPUs that are too small, or not free."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from anyflow_train.config.compose import compose
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from anyflow_train.plan.fit import ENGINES
from anyflow_train.plan.memory import GIB, plan_memory
from anyflow_train.plan.room import Room, shortage
from anyflow_train.training.processes.world import World
from anyflow_train.training.room import check_room

WORLD = 8


def config(*overrides: str, world: int = WORLD) -> RunConfig:
    return compose("train", ["experiment=wan1_3b_forward", *overrides], None, world)


def rooms(free: float, world: int = WORLD, total: float | None = None) -> list[Room]:
    return [Room(f"node{rank // 4}", int(free), int(total or free)) for rank in range(world)]


def test_enough_is_enough() -> None:
    needed = plan_memory(config(), "ddp", WORLD).total
    assert shortage(config(), "ddp", rooms(needed)) is None
    assert shortage(config(), "ddp", rooms(needed - 1)) is not None


def test_one_gpu_that_is_short_is_named_with_what_is_missing_and_what_fits() -> None:
    needed = plan_memory(config(), "ddp", WORLD).total
    found = rooms(80 * GIB)
    found[5] = Room("node1", needed - 2 * GIB, 80 * GIB)
    text = shortage(config(), "ddp", found)
    assert text is not None
    assert "process 5 (node1)" in text
    assert ", 2.0 GiB more than process 5" in text
    assert "free of its 80.0 GiB" in text
    assert text.endswith("engine.micro_batch=1")


def test_an_engine_is_advised_as_it_is_launched() -> None:
    run = config("student/adapter=full", "engine.micro_batch=1")
    limit = plan_memory(run, "ddp", WORLD).total - 6 * GIB
    text = shortage(run, "ddp", rooms(limit, total=80 * GIB))
    assert text is not None
    advised = text.rpartition("): launch/train.sh ")[2]
    assert advised in ENGINES
    assert plan_memory(run, advised, WORLD).total <= limit


def test_only_what_cannot_fit_in_an_empty_gpu_is_an_error() -> None:
    lasting = sum(size for _, size in plan_memory(config(), "ddp", WORLD).state)
    assert shortage(config(), "ddp", rooms(GIB, total=lasting)) is not None
    with pytest.raises(UserError, match=r"GPU memory: .* stay on each GPU .*process 0 \(node0\)"):
        shortage(config(), "ddp", rooms(80 * GIB, total=lasting - 1))


def test_offloading_keeps_nothing_on_the_gpu() -> None:
    text = shortage(config(), "zero3_offload", rooms(GIB))
    assert text is not None
    assert "nothing but more or larger GPUs helps" in text


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], World]:
    """A process on a GPU with so much memory."""

    def pretend(free: float, total: float) -> World:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(total)))
        return World(torch.device("cuda", 0))

    return pretend


def test_a_start_warns_once_and_goes_on(gpu: Callable[..., World], capsys: pytest.CaptureFixture[str]) -> None:
    check_room(config(world=1), gpu(80 * GIB, 80 * GIB))
    assert capsys.readouterr().err == ""
    check_room(config(world=1), gpu(20 * GIB, 80 * GIB))
    warning = capsys.readouterr().err
    assert warning.startswith("warning: GPU memory may not suffice: ")
    assert "ddp on 1" in warning
    assert warning.count("\n") == 1


def test_a_causal_student_is_planned_too(gpu: Callable[..., World], capsys: pytest.CaptureFixture[str]) -> None:
    check_room(compose("train", ["experiment=wan1_3b_causal"], None, 1), gpu(20 * GIB, 80 * GIB))
    assert "are planned (ddp on 1)" in capsys.readouterr().err


def test_a_start_that_cannot_fit_ends(gpu: Callable[..., World]) -> None:
    with pytest.raises(UserError, match="GPU memory"):
        check_room(config(world=1), gpu(2 * GIB, 4 * GIB))


def test_the_launcher_s_engine_is_planned(
    gpu: Callable[..., World], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    for device, engine in (("none", "zero3"), ("cpu", "zero3_offload")):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", device)
        check_room(config(world=1), gpu(2 * GIB, 80 * GIB))
        assert f"({engine} on 1)" in capsys.readouterr().err


def test_a_cpu_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "mem_get_info")
    check_room(config(world=1), World(torch.device("cpu")))
