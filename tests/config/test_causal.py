"""Rules of causal students, and what their experiments say."""

from __future__ import annotations

from typing import Any

import pytest

from anyflow_train.config.compose import compose
from anyflow_train.config.network import Causal, Lora
from anyflow_train.config.on_policy import DistributionMatching
from anyflow_train.errors import UserErrors

CHUNKS = "student.architecture.causal.chunk_partition"


def refused(*settings: str, experiment: str = "tiny_causal", world: int = 1) -> dict[str, str]:
    with pytest.raises(UserErrors) as caught:
        compose("train", [f"experiment={experiment}", *settings], world=world)
    return {error.where: error.problem for error in caught.value.errors}


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ([f"{CHUNKS}=[1,2,1]"], CHUNKS, "sums to 4, but data.frames=17 is 5"),
        (
            ["student.architecture.causal.full_chunk_limit=4"],
            "student.architecture.causal.full_chunk_limit",
            "3 chunks",
        ),
        (
            ["student.architecture.causal.full_chunk_limit=1"],
            "student.architecture.causal.full_chunk_limit",
            "2 or more",
        ),
        (
            ["student.architecture.causal.compressed_patch_size=[1,3,3]"],
            "student.architecture.causal.compressed_patch_size",
            "a multiple of the patch size 2",
        ),
        (["data.height=80"], "data.height", "80 pixels are 10 latents, which is not a multiple of 4"),
        (["context.i2v_probability=0.2"], "context.i2v_probability", "set it to 0"),
        (["objective.velocity=teacher"], "objective.velocity", "set it to data"),
        ([f"{CHUNKS}=[1,4]"], "context.long_share", "never compressed"),
    ],
)
def test_rule(settings: list[str], key: str, words: str) -> None:
    found = refused(*settings)
    assert words in found[key]


def test_sequences_of_two_kinds_of_tokens_are_not_split() -> None:
    assert "causal student; set it to 1" in refused("engine.sequence_parallel=2", world=2)["engine.sequence_parallel"]


def test_given_frames_and_the_teachers_velocity_do_not_go_together() -> None:
    found = refused("context.i2v_probability=0.2", "objective.velocity=teacher", experiment="tiny")
    assert "set it to 0, or objective.velocity=data" in found["context.i2v_probability"]
    found = refused("context.i2v_probability=0.2", "data.frames=1", "objective.velocity=data", experiment="tiny")
    assert "the only latent frame" in found["context.i2v_probability"]


@pytest.mark.parametrize("size", ["1_3b", "14b"])
@pytest.mark.parametrize("stage", ["causal", "causal_reference", "causal_on_policy", "causal_on_policy_reference"])
def test_published_layout(size: str, stage: str) -> None:
    config: Any = compose("train", [f"experiment=wan{size}_{stage}"])
    assert config.student.architecture.causal == Causal()
    assert Causal().chunk_partition == (1, 3, 3, 3, 3, 3, 3, 2)
    assert (Causal().full_chunk_limit, Causal().compressed_patch_size) == (3, (1, 4, 4))
    assert (config.context.long_share, config.context.bidirectional_probability) == (0.5, 0.1)
    assert isinstance(config.student.adapter, Lora)
    assert config.student.adapter.full_modules == ("far_patch_embedding",)
    if isinstance(config.on_policy, DistributionMatching):
        assert config.student.init == f"runs/wan{size}_{stage.replace('_on_policy', '')}"
