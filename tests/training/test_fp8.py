"""Runs whose frozen weights multiply in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_train.config.run import Engine, RunConfig
from anyflow_train.errors import UserError
from anyflow_train.flow.types import Condition, FlowMap
from anyflow_train.models.build import build_network
from anyflow_train.models.fp8 import Fp8Linear, StoredFp8Linear
from anyflow_train.training.engine import engine_name
from anyflow_train.training.networks import load_trained_network
from anyflow_train.training.processes.world import ALONE
from anyflow_train.training.recipe import build_recipe
from anyflow_train.training.start_checks import check_fp8, check_strategy
from tests.training.helpers import SHAPE, TEXT_DIM, assert_equal_runs, settings, train, write_latents

LORA = {"kind": "lora", "rank": 4, "alpha": 4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fp8")
    write_latents(place / "shards")
    architecture = {**adapted(place)["student"]["architecture"], "gate_value": 0.25}
    for name, seed in (("network", 3), ("teacher", 4)):
        build_network(architecture, seed, 0.03).save_pretrained(place / name)
    return place


def adapted(folder: Path, **changes: Any) -> dict[str, Any]:
    """A stage-1 run of 6 steps of adapters on a base that multiplies in 8 bits, of sizes that it may have."""
    config = settings(folder, **{"steps": 6, "engine__precision": "bf16", "engine__fp8": "frozen", **changes})
    student = config["student"]
    student["architecture"] |= {"attention_head_dim": 16}
    student |= {"init": str(folder / "network"), "adapter": student.get("adapter", LORA), "time_frequency_limit": None}
    return config


def in_stage_2(folder: Path, adapter: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The fake score is the teacher's network, or an adapter on it as the student is."""
    config = adapted(folder, teacher__source=str(folder / "network"), student__adapter=adapter, **changes)
    fake = {"init": str(folder / "network"), "adapter": adapter}
    config["on_policy"] = {"kind": "distribution_matching", "calls": [2], "fake_score": fake}
    return config


def called(flow_map: FlowMap) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn((2, *SHAPE), generator=draw), torch.randn(2, 4, TEXT_DIM, generator=draw)
    with torch.no_grad():
        return flow_map(x, torch.tensor([0.8, 0.5]), torch.tensor([0.3, 0.5]), Condition(text))


def roles(config: dict[str, Any], fp8: str) -> Any:
    return build_recipe(RunConfig.model_validate(config | {"engine": config["engine"] | {"fp8": fp8}}), ALONE).roles


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_the_student_and_not_its_derivative_is_called_in_8_bits(folder: Path) -> None:
    config = adapted(folder)
    eight, plain = roles(config, "frozen"), roles(config, "none")
    assert 0.001 < off(called(eight.student), called(plain.student)) < 0.1
    assert torch.equal(called(eight.derivative), called(plain.derivative))


def test_a_teacher_of_its_own_is_stored_in_8_bits(folder: Path) -> None:
    changes = {"teacher__source": str(folder / "teacher"), "objective__velocity": "teacher"}
    config = adapted(folder, **changes, student__adapter={"kind": "full"})
    eight, plain = roles(config, "frozen"), roles(config, "none")
    assert any(isinstance(module, StoredFp8Linear) for module in eight.teacher.network.modules())
    assert 0.001 < off(called(eight.teacher), called(plain.teacher)) < 0.1
    # of the student nothing is frozen
    assert torch.equal(called(eight.student), called(plain.student))


def test_all_roles_on_one_base_multiply_in_8_bits(folder: Path) -> None:
    config = in_stage_2(folder, LORA)
    eight, plain = roles(config, "frozen"), roles(config, "none")
    for role in ("student", "teacher", "fake_score"):
        assert 0.001 < off(called(getattr(eight, role)), called(getattr(plain, role))) < 0.1, role
    assert torch.equal(called(eight.derivative), called(plain.derivative))


@pytest.mark.parametrize("adapter", [LORA, {"kind": "full"}])
def test_stage_2_trains(folder: Path, tmp_path: Path, adapter: dict[str, Any]) -> None:
    run = train(in_stage_2(folder, adapter, out=str(tmp_path), steps=2, student__gradient_checkpointing="block"))
    assert (run / "done.json").is_file()


def test_an_interrupted_run_goes_on_bit_exactly_and_hands_on_a_plain_network(folder: Path, tmp_path: Path) -> None:
    whole, parts = (adapted(folder, out=str(tmp_path), name=name) for name in ("whole", "parts"))
    run = train(whole)
    train(parts | {"steps": 3})
    assert_equal_runs(train(parts), run)
    network = load_trained_network(run)
    assert not any(isinstance(module, Fp8Linear) for module in network.modules())
    start = {name: torch.count_nonzero(p) for name, p in network.named_parameters() if "lora_B" in name}
    assert min(start.values()) > 0  # every adapter has learned something


def test_a_gpu_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(UserError, match=r"capability 8.9, but .*A100 has 8.0; set it to none") as caught:
        check_fp8(Engine(fp8="frozen"), torch.device("cuda"))
    assert caught.value.where == "engine.fp8"
    check_fp8(Engine(), torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_fp8(Engine(fp8="frozen"), torch.device("cuda"))


def test_shards_of_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    config = RunConfig.model_validate(settings(Path(), engine__fp8="frozen"))
    for stage in ("2", "3"):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
        if stage == "2":
            check_strategy(config, engine_name())
            continue
        with pytest.raises(UserError, match=r"^engine.fp8: .*zero3, which shards the weights; choose ddp to zero2"):
            check_strategy(config, engine_name())
