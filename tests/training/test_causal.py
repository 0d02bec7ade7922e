"""Causal students in training: both stages, exact resume, and the weights that they can start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from anyflow_train.evaluation.load import load_model
from anyflow_train.models.far_transformer import AnyFlowFARTransformer3DModel
from anyflow_train.training.networks import start_student
from tests.training.helpers import assert_equal_runs, causal, settings, train, write_latents, write_networks

LORA = {"kind": "lora", "rank": 2, "alpha": 2.0, "full_modules": ["far_patch_embedding"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal")
    write_latents(folder / "shards", frames=3)
    write_networks(folder)
    return folder


def stage_1(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    return causal(settings(folder, name=name, **changes))


def stage_2(folder: Path, name: str, start: str, **changes: Any) -> dict[str, Any]:
    config = stage_1(folder, name, **changes)
    config["student"] |= {"init": str(folder / start), "time_frequency_limit": None}
    config["teacher"] = {"source": str(folder / "teacher")}
    fake = {"init": str(folder / "teacher"), "lr": 2e-3, "updates": 2}
    return {**config, "on_policy": {"kind": "distribution_matching", "calls": [1, 4], "fake_score": fake}}


def logged(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def in_two_parts(config: dict[str, Any], name: str, first: int) -> Path:
    """Train a run that is stopped and started again."""
    config = {**config, "name": name}
    train({**config, "steps": first})
    return train(config)


def test_both_stages_resume_exactly(folder: Path) -> None:
    first = stage_1(folder, "stage-1")
    run = train(first)
    assert_equal_runs(run, in_two_parts(first, "stage-1-in-parts", 4))
    rows = logged(run)
    whole = [row for row in rows if "bidirectional/loss_diffusion" in row]
    assert 0 < len(whole) < len(rows)  # the term of whole clips comes in some of the steps
    second = stage_2(folder, "stage-2", "stage-1", steps=4)
    assert_equal_runs(train(second), in_two_parts(second, "stage-2-in-parts", 3))  # 3: in the middle of a turn
    assert all(torch.isfinite(torch.tensor([row["loss"] for row in logged(folder / "stage-2") if "loss" in row])))


def test_a_shared_base_serves_a_causal_student_and_a_teacher_of_whole_clips(folder: Path) -> None:
    first = stage_1(folder, "lora-1", steps=2)
    first["student"] |= {"init": str(folder / "teacher"), "time_frequency_limit": None, "adapter": LORA}
    train(first)
    second = stage_2(folder, "lora-2", "lora-1", steps=4)
    second["student"]["adapter"] = second["on_policy"]["fake_score"]["adapter"] = LORA
    # A role of its own for each is the same run: the teacher's loss sees whole clips on the causal base.
    apart = {**second, "name": "lora-2-apart"}
    fake = {**second["on_policy"]["fake_score"], "adapter": {"kind": "full"}}
    apart["on_policy"] = {**second["on_policy"], "fake_score": fake}
    shared, own = logged(train(second)), logged(train(apart))
    key = "distribution_matching/normaliser"  # of teacher and student alone
    # float32, other sums: adapters beside the weights or not; the first turn, before the fake scores differ
    assert shared[0][key] == pytest.approx(own[0][key], rel=1e-5)


@pytest.mark.parametrize("source", ["network", "bidirectional"])
def test_a_network_of_whole_clips_becomes_causal(folder: Path, source: str) -> None:
    if source == "bidirectional" and not (folder / source).exists():
        config = settings(folder, name=source, steps=1)
        train({**config, "data": {**config["data"], "frames": 9}})
    config = stage_1(folder, "from")
    config["student"] |= {"init": str(folder / source), "time_frequency_limit": None}
    network: Any = start_student(RunConfig.model_validate(config).student, 0)
    assert isinstance(network, AnyFlowFARTransformer3DModel)
    wanted = torch.nn.functional.interpolate(
        network.patch_embedding.weight.flatten(0, 1)[:, None], size=(1, 4, 4), mode="trilinear"
    ).view_as(network.far_patch_embedding.weight)
    torch.testing.assert_close(network.far_patch_embedding.weight, wanted)


def test_a_causal_run_does_not_become_a_student_of_whole_clips(folder: Path) -> None:
    train(stage_1(folder, "one-step", steps=1))
    config = settings(folder, name="back")
    config["student"] |= {"init": str(folder / "one-step"), "time_frequency_limit": None}
    with pytest.raises(UserError, match=r"causal: is null, but .* is a causal student"):
        start_student(RunConfig.model_validate(config).student, 0)


def test_a_trained_run_is_sampled_chunk_by_chunk(folder: Path) -> None:
    train(stage_1(folder, "sampled", steps=1))
    model = load_model(str(folder / "sampled"), "ema")
    assert model.chunks is not None
    assert model.sampler.chunks == model.chunks
    assert model.chunks.partition == (1, 1, 1)


def test_the_first_frame_is_given_while_it_is_trained(folder: Path) -> None:
    config = settings(folder, name="i2v", steps=6, context__i2v_probability=0.5)
    assert len(logged(train({**config, "data": {**config["data"], "frames": 9}}))) == 6


def test_a_causal_run_is_no_teacher(folder: Path) -> None:
    train(stage_1(folder, "teaching", steps=1))
    config = stage_2(folder, "taught", "teaching")
    with pytest.raises(UserError, match=r"teacher\.source: .* is a causal student"):
        train({**config, "teacher": {"source": str(folder / "teaching")}})


def test_a_causal_run_goes_on_with_clips_of_another_length(folder: Path) -> None:
    train(stage_1(folder, "three", steps=1))
    write_latents(folder / "shards-2", frames=2)
    config = stage_1(folder, "two", steps=1)
    config["student"] |= {"init": str(folder / "three"), "time_frequency_limit": None}
    config["student"]["architecture"] |= {"causal": {"chunk_partition": [1, 1], "full_chunk_limit": 2}}
    config |= {"data": {**config["data"], "frames": 5, "shards": str(folder / "shards-2")}}
    config["context"] = {"long_share": 0.0}
    model = load_model(str(train(config)), "ema")
    assert model.chunks is not None
    assert model.chunks.partition == (1, 1)
