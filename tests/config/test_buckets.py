"""Rules about several sizes of clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anyflow_train.config.commands import PrepareConfig
from anyflow_train.config.compose import compose
from anyflow_train.config.derived import table
from anyflow_train.config.rules import commands
from anyflow_train.config.rules.run import run_errors
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from tests.training.helpers import causal, on_policy, settings

SIZES = [[9, 32, 32], [9, 16, 48], [1, 32, 32]]


def errors(config: dict[str, Any], **data: object) -> list[str]:
    changed = config | {"data": config["data"] | {"frames": 9, "buckets": SIZES, **data}}
    return [str(finding.error()) for finding in run_errors(RunConfig.model_validate(changed), 1)]


def test_sizes_that_fit_the_run_are_accepted(tmp_path: Path) -> None:
    config = settings(tmp_path)
    assert errors(config) == []
    assert errors(config, buckets=["9x32x32", "1x32x32"]) == []
    changed = config | {"data": config["data"] | {"frames": 9, "buckets": SIZES}}
    rows = dict(table(RunConfig.model_validate(changed), 1))
    assert rows["bucket 1x32x32"] == "4 tokens per sample, 3 x 8 samples in a step"
    assert rows["bucket 9x16x48"] == "9 tokens per sample, 8 samples in a step"


def test_sizes_that_cannot_work_are_refused_by_key(tmp_path: Path) -> None:
    config = settings(tmp_path)
    (found,) = errors(config, buckets=[[9, 32, 32], [10, 32, 40]])[:1]
    assert found.startswith("data.buckets.1: 10 frames are not 4n + 1")
    assert "data.buckets.1: 40 pixels are not a multiple of 16" in errors(config, buckets=[SIZES[0], [9, 32, 40]])[0]
    assert "more than student.architecture.rope_max_seq_len=16" in errors(config, buckets=[SIZES[0], [9, 32, 800]])[0]
    assert "names a size twice" in errors(config, buckets=[SIZES[0], SIZES[0]])[0]
    (found,) = errors(config, buckets=SIZES[1:])
    assert found.startswith("data.buckets: [9x16x48, 1x32x32] does not have 9x32x32, the size of validation")
    (found,) = errors({**config, "context": {"i2v_probability": 0.5}})
    assert found.startswith("context.i2v_probability: 0.5 would give the only latent frame of a bucket of pictures")
    # Chunks divide all clips, and patches of compressed context all pictures.
    found = errors(causal(config), buckets=[SIZES[0], [9, 32, 64], SIZES[2]])
    assert [line.partition(":")[0] for line in found] == ["data.buckets.2"]
    found = errors(causal(config))
    assert {line.partition(":")[0] for line in found} == {"data.buckets.1", "data.buckets.2"}
    assert errors(on_policy(tmp_path)) == []


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"buckets": ["17x64x64", "17x64x64"]}, "buckets"),
        ({"buckets": ["17x64x64", "17x48x40"]}, "buckets.1"),
        ({"source": None, "prompts": "p.txt", "buckets": ["17x64x64"]}, "buckets"),
        ({"source": None, "prompts": "p.txt", "windows": "all"}, "windows"),
        ({"source": None, "prompts": "p.txt", "teacher": "t", "min_seconds": 2.0}, "min_seconds"),
        ({"steps": 8}, "steps"),
        ({"source": None, "latents": "l", "dry_run": True}, "dry_run"),
    ],
)
def test_prepare_refuses_sizes_and_keys_without_effect_by_key(changes: dict[str, object], where: str) -> None:
    config = PrepareConfig.model_validate({"out": "o", "source": "s", "codec": "c", **changes})
    assert [finding.keys[0] for finding in commands.prepare(config)] == [where]


def test_prepare_refuses_a_size_next_to_buckets_if_the_user_gave_both() -> None:
    arguments = ["experiment=tiny_prepare", "source=s", "out=o", "buckets=[17x64x64,17x48x80]"]
    assert compose("prepare", arguments).frames == 17  # of the experiment
    with pytest.raises(UserError, match=r"^height: 48 has no effect, as buckets say the sizes"):
        compose("prepare", [*arguments, "height=48"])


@pytest.mark.parametrize("windows", ["0", "0s", "-1", "2 s", "s", "half", 1.5])
def test_windows_are_a_word_a_number_or_seconds(windows: object) -> None:
    with pytest.raises(ValueError, match="give first, all, a number of windows"):
        PrepareConfig.model_validate({"out": "o", "codec": "c", "windows": windows})
