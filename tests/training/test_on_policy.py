"""Stage 2 in the trainer: two roles, their turns, their saved tensors, and a resume in the middle of a turn."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.types import Condition
from anyflow_train.models.adapters import trainable_parameters
from anyflow_train.models.build import build_network
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.models.transformer import AnyFlowTransformer3DModel
from anyflow_train.training import run as training
from anyflow_train.training.checkpoints.reading import list_checkpoints, read_info
from anyflow_train.training.networks import load_trained_network
from anyflow_train.training.processes.world import ALONE
from anyflow_train.training.recipe import Recipe, build_loader, build_recipe
from anyflow_train.training.updates import make_update
from tests.training.helpers import (
    SHAPE,
    TEXT_DIM,
    assert_equal_runs,
    final_tensors,
    in_process,
    settings,
    train,
    train_and_die,
    write_latents,
    write_networks,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("on-policy")
    write_latents(place / "shards")
    write_networks(place)
    return place


def on_policy(folder: Path, **changes: Any) -> dict[str, Any]:
    """A stage-2 run of 8 steps in which the student's turn comes every second step."""
    config = settings(folder, **{"log_every": 1, "optimizer__lr": 1e-3, **changes})
    config["student"] |= {"init": str(folder / "network"), "time_frequency_limit": None}
    config["teacher"] = {"source": str(folder / "teacher")}
    matching = {"kind": "distribution_matching", "calls": [2, 4], **config.get("on_policy", {})}
    fake = {"init": str(folder / "teacher"), "lr": 5e-3, "updates": 2}
    config["on_policy"] = {**matching, "fake_score": {**fake, **matching.get("fake_score", {})}}
    return config


LORA = {"kind": "lora", "rank": 2, "alpha": 2.0, "full_modules": ["delta_embedder"]}


def on_one_base(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a stage-2 run with adapters on the teacher's network."""
    config = on_policy(folder, **changes)
    config["student"] |= {"init": str(folder / "teacher"), "adapter": LORA}
    config["on_policy"]["fake_score"]["adapter"] = LORA
    return config


def weights(run: Path, step: int, group: str) -> dict[str, Tensor]:
    files = sorted((run / "checkpoints" / f"step_{step:08d}").glob(f"{group}-*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    return train(on_policy(folder, name="whole", checkpoint__every=1, checkpoint__keep=20))


def changed(run: Path, step: int, group: str) -> bool:
    before, after = weights(run, step - 1, group), weights(run, step, group)
    return any(not torch.equal(before[name], after[name]) for name in before)


def test_the_student_has_every_second_turn_and_the_fake_score_every_one(whole: Path) -> None:
    for step in range(2, 9):
        assert changed(whole, step, "weights") == (step % 2 == 1)
        assert changed(whole, step, "fake_score.weights")


def test_counts_and_groups_are_each_role_s_own(whole: Path) -> None:
    info = read_info(list_checkpoints(whole / "checkpoints")[-1])
    assert info.adam_steps == {"student": 4, "fake_score": 8}
    groups = {name.split(":")[0].rsplit("-", 1)[0] for name in final_tensors(whole)}
    trained = ("weights", "exp_avg", "exp_avg_sq")
    assert groups == {*trained, "ema", *(f"fake_score.{kind}" for kind in trained)}


def test_what_is_logged(whole: Path) -> None:
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [("loss" in row, "fake_score/loss" in row) for row in rows] == [(True, True), (False, True)] * 4
    assert rows[0]["distribution_matching/loss"] == 0  # the fake score begins as the teacher
    row = rows[2]
    for name in ("loss", "direction_norm", "normaliser"):
        assert row[f"distribution_matching/{name}"] > 0
    assert any(name.startswith("distribution_matching/rollout_std_") for name in row)
    assert row["flow_map/loss_diffusion"] > 0


def test_each_role_has_its_own_learning_rate(folder: Path, whole: Path) -> None:
    """Adam's first step moves what has a gradient by the rate, here a third of it: the first of three of warm-up."""
    for group, source, rate in (("weights", "network", 1e-3), ("fake_score.weights", "teacher", 5e-3)):
        start = dict(AnyFlowTransformer3DModel.from_pretrained(folder / source).named_parameters())
        moved = max((tensor - start[name]).abs().max().item() for name, tensor in weights(whole, 1, group).items())
        assert moved == pytest.approx(rate / 3, rel=1e-2)  # eps against small gradients


@pytest.mark.parametrize(("place", "count"), [("step", 6), ("backward", 9), ("write", 20)])
def test_a_killed_run_goes_on_in_the_middle_of_a_turn(
    folder: Path, whole: Path, tmp_path: Path, place: str, count: int
) -> None:
    """The sixth optimizer step is the fake score's of step 4, whose checkpoint was not written: 3 is taken up again."""
    config = on_policy(folder, out=str(tmp_path), name="whole", checkpoint__every=1, checkpoint__keep=20)
    process = in_process(train_and_die, config, place, count)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    done = list_checkpoints(tmp_path / "whole" / "checkpoints")
    assert 0 < len(done) < 8
    assert_equal_runs(train(config), whole)


def test_reused_rollouts_cost_no_calls_and_fresh_ones_do(folder: Path) -> None:
    calls = {}
    for rollout in ("fresh", "student"):
        config = RunConfig.model_validate(on_policy(folder, on_policy__fake_score={"rollout": rollout}))
        recipe = build_recipe(config, ALONE)
        count = 0

        def counted(*arguments: Any, **named: Any) -> None:
            nonlocal count
            count += 1

        recipe.trainables["student"].network.register_forward_pre_hook(counted, with_kwargs=True)
        step_once(recipe, folder)
        calls[rollout] = count
    assert calls["fresh"] - calls["student"] in (4, 6)  # 2 or 3 jumps for each of two micro-batches


def step_once(recipe: Recipe, folder: Path) -> None:
    config = RunConfig.model_validate(on_policy(folder))
    loader = build_loader(config, ALONE, 0)
    batches = next(iter(loader))
    loader.close()
    draws = [Draw(0, 0, batch.positions, ALONE.device) for batch in batches]
    for update in recipe.updates:
        report = make_update(update, recipe.trainables[update.role], recipe.roles, batches, draws, 1e-3, "")
        assert report.applied


def test_roles_on_one_base_take_its_memory_once_and_leave_it_alone(folder: Path) -> None:
    config = RunConfig.model_validate(on_one_base(folder))
    recipe = build_recipe(config, ALONE)
    student, fake = recipe.trainables["student"], recipe.trainables["fake_score"]
    assert student.network is fake.network
    base = AnyFlowTransformer3DModel.from_pretrained(folder / "teacher")
    own = {id(p): p.numel() for role in (student, fake) for p in role.engine.shards().values()}
    held = sum(p.numel() for p in student.network.parameters())
    assert held == sum(p.numel() for p in base.parameters()) + sum(own.values())
    flow_map = NetworkFlowMap(base.eval().requires_grad_(False), None)
    x, t = torch.randn(2, *SHAPE), torch.tensor([0.9, 0.4])
    condition = Condition(torch.randn(2, 4, TEXT_DIM))
    for _ in range(2):
        step_once(recipe, folder)
    assert recipe.roles.teacher is not None
    assert recipe.roles.fake_score is not None
    with torch.no_grad():
        wanted = flow_map(x, t, t, condition)
        assert torch.equal(recipe.roles.teacher(x, t, t, condition), wanted)
        for trained in (recipe.roles.student, recipe.roles.fake_score):
            assert not torch.equal(trained(x, t, t, condition), wanted)


def test_a_run_on_one_base_goes_on_exactly_and_is_read_as_any_other(folder: Path, tmp_path: Path) -> None:
    once = train(on_one_base(folder, out=str(tmp_path), name="once"))
    config = on_one_base(folder, out=str(tmp_path), name="twice", steps=3)
    train(config)
    assert_equal_runs(train({**config, "steps": 8}), once)
    network = load_trained_network(once)
    averages = weights(once, 8, "ema")
    assert all(torch.equal(p, averages[name]) for name, p in trainable_parameters(network).items())
    assert averages.keys() == trainable_parameters(network).keys()


def test_stage_2_goes_on_with_the_adapter_of_stage_1(folder: Path, tmp_path: Path) -> None:
    first = settings(folder, out=str(tmp_path), name="first")
    first["student"] |= {"init": str(folder / "teacher"), "time_frequency_limit": None, "adapter": LORA}
    config = on_one_base(folder, out=str(tmp_path), steps=1, optimizer__lr=1e-12)
    config["student"]["init"] = str(train(first))
    before, after = weights(tmp_path / "first", 8, "ema"), weights(train(config), 1, "weights")
    assert before.keys() == after.keys()
    # one step of Adam at that rate moves nothing that float32 can see, but where a number is about 0
    assert all(torch.allclose(after[name], tensor, rtol=0, atol=1e-10) for name, tensor in before.items())


def test_a_base_that_is_not_the_teacher_is_refused(folder: Path, tmp_path: Path) -> None:
    config = on_one_base(folder, out=str(tmp_path))
    config["student"]["init"] = str(folder / "network")
    with pytest.raises(UserError, match=r"teacher\.source.*is neither .*network"):
        training.run(RunConfig.model_validate(config))


def test_without_the_objective_only_rollouts_train_the_student(folder: Path) -> None:
    recipe = build_recipe(RunConfig.model_validate(on_policy(folder, on_policy__objective_weight=0.0)), ALONE)
    student, fake = recipe.updates
    assert [term.name for term in student.terms] == ["distribution_matching"]
    assert (student.every, fake.every) == (2, 1)


def test_a_checkpoint_s_student_is_read_as_any_other(whole: Path) -> None:
    network = load_trained_network(whole)
    averages = weights(whole, 8, "ema")
    assert all(torch.equal(tensor, averages[name]) for name, tensor in network.named_parameters())


def test_a_teacher_of_another_size_teaches(folder: Path, tmp_path: Path) -> None:
    architecture = {**settings(folder)["student"]["architecture"], "gate_value": 0.25, "num_layers": 2, "ffn_dim": 48}
    build_network(architecture, 5, 0.03).save_pretrained(tmp_path / "big")
    config = on_policy(folder, out=str(tmp_path), steps=2, on_policy__fake_score={"init": str(tmp_path / "big")})
    config["teacher"] = {"source": str(tmp_path / "big")}
    run = train(config)
    assert len(weights(run, 2, "fake_score.weights")) > len(weights(run, 2, "weights"))


@pytest.mark.parametrize("key", ["teacher.source", "on_policy.fake_score.init"])
def test_a_network_of_other_latents_is_refused(folder: Path, tmp_path: Path, key: str) -> None:
    shape = {**settings(folder)["student"]["architecture"], "gate_value": 0.25, "text_dim": 4}
    build_network(shape, 5, 0.03).save_pretrained(tmp_path / "other")
    config = on_policy(folder, out=str(tmp_path))
    owner = config["teacher"] if key == "teacher.source" else config["on_policy"]["fake_score"]
    owner[key.rpartition(".")[2]] = str(tmp_path / "other")
    with pytest.raises(UserErrors) as refused:
        training.run(RunConfig.model_validate(config))
    assert [(error.where, error.problem.partition("has ")[2]) for error in refused.value.errors] == [
        (key, f"text_dim=4, but the student has {TEXT_DIM}")
    ]


def test_a_missing_fake_score_is_named(folder: Path, tmp_path: Path) -> None:
    config = on_policy(folder, out=str(tmp_path), on_policy__fake_score={"init": str(tmp_path / "nothing")})
    with pytest.raises(UserError, match=r"on_policy\.fake_score\.init"):
        training.run(RunConfig.model_validate(config))
