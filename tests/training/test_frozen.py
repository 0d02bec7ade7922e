"""Runs whose frozen weights are stored in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.config.run import RunConfig
from anyflow_train.models.frozen import HalfLinear
from anyflow_train.training.networks import load_trained_network
from anyflow_train.training.processes.world import ALONE
from anyflow_train.training.recipe import build_recipe
from tests.training.helpers import assert_equal_runs, causal, on_policy, settings, train, write_latents, write_networks

LORA = {"kind": "lora", "rank": 2, "alpha": 3.0, "full_modules": ["delta_embedder", "ffn.net.2"]}
LORA |= {"targets": ["attn1.to_q", "ffn.net.0.proj"]}
GUIDED = {"guidance": "target", "guidance_scale": 3.0, "text_dropout": 0.4}
MIXED = {"kind": "mixed", "velocity": "teacher", "derivative_precision": "bf16", **GUIDED}


def run(folder: Path, name: str, frozen: str, **changes: Any) -> dict[str, Any]:
    """A stage-1 run of 4 steps whose products are all in bfloat16, those of the time derivative included."""
    base = {"steps": 4, "engine__precision": "bf16", "engine__frozen_precision": frozen, "objective": MIXED}
    start = {"student__init": str(folder / "network"), "student__time_frequency_limit": None, "student__adapter": LORA}
    config = settings(folder, name=f"{name}-{frozen}", **base, **start)
    for key, value in changes.items():
        path, _, last = key.rpartition("__")
        (config[path] if path else config)[last] = value
    return config


def in_stage_2(folder: Path, name: str, frozen: str) -> dict[str, Any]:
    config = on_policy(folder, name=f"{name}-{frozen}", steps=3, engine__precision="bf16", student__adapter=LORA)
    config["engine"]["frozen_precision"], config["teacher"]["source"] = frozen, str(folder / "network")
    config["on_policy"]["fake_score"] = {"init": str(folder / "network"), "adapter": LORA}
    config["objective"]["derivative_precision"] = "bf16"
    return causal(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("frozen")
    write_latents(place / "shards")
    write_latents(place / "longer", frames=3)
    write_networks(place)
    return place


def one_base(folder: Path, frozen: str) -> dict[str, Any]:
    return run(folder, "base", frozen, teacher={"source": str(folder / "network")})


def own_teacher(folder: Path, frozen: str) -> dict[str, Any]:
    return run(folder, "own", frozen, teacher={"source": str(folder / "teacher"), "codec": "none"})


def causal_stage_2(folder: Path, frozen: str) -> dict[str, Any]:
    config = in_stage_2(folder, "causal", frozen)
    config["data"]["shards"] = str(folder / "longer")
    return config


@pytest.mark.parametrize("kind", [one_base, own_teacher, causal_stage_2])
def test_training_is_bit_equal_to_float32_weights(folder: Path, kind: Any) -> None:
    """Modules that an adapter trains whole start from the source's weights, not from rounded ones."""
    half = RunConfig.model_validate(kind(folder, "bf16"))
    roles = build_recipe(half, ALONE)
    for trainable in roles.trainables.values():
        assert any(isinstance(module, HalfLinear) for module in trainable.network.modules())
        assert {shard.dtype for shard in trainable.engine.shards().values()} == {torch.float32}
    assert_equal_runs(train(kind(folder, "bf16")), train(kind(folder, "fp32")))


def test_an_interrupted_run_resumes_bit_for_bit_and_exports_the_weights_of_the_source(folder: Path) -> None:
    whole, parts = (one_base(folder, "bf16") | {"name": name} for name in ("whole", "parts"))
    done = train(whole)
    train(parts | {"steps": 2})
    assert_equal_runs(train(parts), done)
    source = dict(load_trained_network(folder / "base-fp32").named_parameters())
    for name, parameter in load_trained_network(done).named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, source[name]), name
