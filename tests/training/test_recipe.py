"""From config to networks, roles and updates; what cannot be built is named by its key."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.config.derived import shares_base
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.flow.types import FlowMapWithin
from anyflow_train.models.build import build_network
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.training.networks import load_trained_network, start_student
from anyflow_train.training.processes.world import World
from anyflow_train.training.recipe import build_loader, build_recipe
from tests.training.helpers import final_tensors, settings, train, write_latents

CPU = World(torch.device("cpu"))


def config(folder: Path, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(settings(folder, **changes))


def saved_network(folder: Path, gate_value: float = 0.25) -> str:
    """A network on the disk, like a published AnyFlow checkpoint."""
    architecture = config(folder).student.architecture.arguments()
    build_network({**architecture, "gate_value": gate_value}, seed=3).save_pretrained(folder / "network")
    return str(folder / "network")


def test_the_derivative_has_its_own_network_and_precision(tmp_path: Path) -> None:
    plain = build_recipe(config(tmp_path, engine__precision="bf16"), CPU)
    assert isinstance(plain.roles.student, NetworkFlowMap)
    assert isinstance(plain.roles.derivative, NetworkFlowMap)
    assert plain.roles.student.autocast_dtype is torch.bfloat16
    assert plain.roles.derivative.autocast_dtype is None
    assert plain.roles.derivative.network is plain.roles.student.network
    averaged = build_recipe(config(tmp_path, objective__derivative_network="ema"), CPU)
    assert isinstance(averaged.roles.derivative, FlowMapWithin)


def test_the_term_of_each_stage_has_the_rebalancing_of_its_config(tmp_path: Path) -> None:
    """Without the floor, a student that starts as its teacher would train nothing."""
    schedule = [{"steps": 2, "changes": {"objective.rebalance_floor": 0.5, "objective.rebalance": "sqrt"}}]
    keys = {"objective__rebalance": "unweighted", "objective__rebalance_floor": 0.07, "objective__schedule": schedule}
    terms = [update.terms[0] for update in build_recipe(config(tmp_path, **keys), CPU).updates]
    assert [(term.rebalance, term.smallest_mean) for term in terms] == [("sqrt", 0.5), ("unweighted", 0.07)]


def test_the_teacher_is_loaded_only_for_its_velocity_and_frozen(tmp_path: Path) -> None:
    source = saved_network(tmp_path)
    assert build_recipe(config(tmp_path, teacher__source=source), CPU).roles.teacher is None
    changes = {"teacher__source": source, "objective__velocity": "teacher"}
    teacher = build_recipe(config(tmp_path, **changes), CPU).roles.teacher
    assert isinstance(teacher, NetworkFlowMap)
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())


def test_adapters_on_the_teacher_train_the_same_with_and_without_a_network_of_its_own(tmp_path: Path) -> None:
    """Train in float32, where the teacher's velocity comes from the student's frozen base."""
    write_latents(tmp_path / "shards")
    source = saved_network(tmp_path)
    shutil.copytree(source, tmp_path / "twin")
    lora = {"kind": "lora", "rank": 2, "alpha": 2.0, "full_modules": ["condition_embedder.delta_embedder"]}
    changes = {"student__init": source, "student__adapter": lora, "objective__velocity": "teacher", "steps": 4}
    one, two = (
        {**changes, "name": name, "teacher__source": teacher, "student__time_frequency_limit": None}
        for name, teacher in (("shared", source), ("apart", str(tmp_path / "twin")))
    )
    assert isinstance(build_recipe(config(tmp_path, **one), CPU).roles.teacher, FlowMapWithin)
    assert isinstance(build_recipe(config(tmp_path, **two), CPU).roles.teacher, NetworkFlowMap)
    assert not shares_base(config(tmp_path, **one, student__deltatime_type="t-r"))  # its base is not the teacher
    shared, apart = (final_tensors(train(settings(tmp_path, **changes))) for changes in (one, two))
    assert shared.keys() == apart.keys()
    for name, tensor in shared.items():
        torch.testing.assert_close(tensor, apart[name], rtol=1e-6, atol=1e-7)


def test_a_missing_start_is_named_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        start_student(config(tmp_path, student__init=str(tmp_path / "nothing")).student, 0)
    assert caught.value.where == "student.init"
    changes = {"teacher__source": str(tmp_path / "nothing"), "objective__velocity": "teacher"}
    with pytest.raises(UserError) as caught:
        build_recipe(config(tmp_path, **changes), CPU)
    assert caught.value.where == "teacher.source"


def test_another_architecture_is_named_by_key_and_both_values(tmp_path: Path) -> None:
    source = saved_network(tmp_path)
    changes = {"student__init": source, "student__architecture__num_layers": 2, "student__architecture__ffn_dim": 64}
    with pytest.raises(UserErrors) as caught:
        start_student(config(tmp_path, **changes).student, 0)
    assert [error.where for error in caught.value.errors] == [
        "student.architecture.ffn_dim",
        "student.architecture.num_layers",
    ]
    assert "is 2" in caught.value.errors[1].problem
    assert "trained with 1" in caught.value.errors[1].problem


def test_another_gate_is_named_with_both_values(tmp_path: Path) -> None:
    source = saved_network(tmp_path, gate_value=0.5)
    with pytest.raises(UserError, match=r"gate_value = 0\.5.*cannot use 0\.25"):
        start_student(config(tmp_path, student__init=source).student, 0)


def test_a_fully_trained_student_needs_its_start_no_more(tmp_path: Path) -> None:
    write_latents(tmp_path / "shards")
    source = saved_network(tmp_path)
    run = train(settings(tmp_path, steps=1, student__init=source))
    Path(source).rename(tmp_path / "elsewhere")
    network = load_trained_network(run, "raw")
    assert network.config["gate_value"] == 0.25


def test_shards_for_something_else_are_refused(tmp_path: Path) -> None:
    write_latents(tmp_path / "shards")
    with pytest.raises(UserErrors, match=r"data\.frames"):
        build_loader(config(tmp_path, data__frames=9), CPU, 0)
