"""Runs of a few steps with each way to learn a flow map: adapters and all weights, without clips, causal, stage 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.config.own import run_model
from anyflow_train.config.rules.run import run_errors
from anyflow_train.config.run import RunConfig
from anyflow_train.data.manifest import CodecInfo, Manifest, PromptTexts
from anyflow_train.data.shards import Sample
from anyflow_train.errors import UserError
from anyflow_train.plan.dry_run import dry_run
from anyflow_train.training import run as training
from anyflow_train.training.start_checks import check_strategy
from tests.conftest import with_nightly
from tests.shards import write_shards
from tests.training.helpers import (
    TEXT_DIM,
    assert_equal_runs,
    causal,
    final_tensors,
    on_policy,
    settings,
    train,
    write_latents,
    write_networks,
)

KINDS = ("flow_map", "lagrangian", "semigroup", "mixed")
# A mix has both of the others in it.
ALONE = with_nightly(KINDS, ("lagrangian", "semigroup"))
LORA = {"kind": "lora", "rank": 2, "alpha": 2.0, "targets": ["attn1.to_q"], "full_modules": ["delta_embedder"]}


def write_prompts(folder: Path) -> None:
    """Shards as `anyflow prepare prompts=...` writes them."""
    generator = torch.Generator().manual_seed(0)

    def produce() -> Iterator[Sample]:
        for number in range(20):
            yield Sample(f"prompt-{number:08d}", None, torch.randn(3, TEXT_DIM, generator=generator), f"{number}")

    codec = CodecInfo(source="somewhere", text_encoder="def")
    manifest = Manifest(
        format="anyflow_train shards 1", kind="prompts", shards=(), text_dim=TEXT_DIM, longest_text=3, codec=codec
    )
    write_shards(folder, [produce()], manifest, PromptTexts(torch.zeros(1, TEXT_DIM), ()))


def follow(folder: Path, kind: str, objective: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run that starts from its teacher, `folder/teacher`."""
    keys = {"kind": kind, "velocity": "teacher", "weight": "uniform", "derivative_network": "ema", **objective}
    return settings(
        folder,
        objective=keys,
        student__init=str(folder / "teacher"),
        student__time_frequency_limit=None,
        teacher={"source": str(folder / "teacher"), "codec": "none"},
        **changes,
    )


def trains_and_resumes(config: dict[str, Any]) -> None:
    """Check that two steps and two more give what four steps give, and that the student changes."""
    folder = Path(config["out"])
    assert run_errors(RunConfig.model_validate(config), 1) == []
    for name, lengths in (("whole", (4,)), ("parts", (2, 4))):
        for steps in lengths:
            train({**config, "name": name, "steps": steps})
    assert_equal_runs(folder / "whole", folder / "parts")
    assert all(tensor.isfinite().all() for tensor in final_tensors(folder / "whole").values())


@pytest.mark.parametrize("kind", KINDS)
def test_without_clips_from_prompts_alone(kind: str, tmp_path: Path) -> None:
    write_prompts(tmp_path / "shards")
    write_networks(tmp_path)
    guided = {"guidance": "target", "guidance_scale": 3.0, "source": "student"}
    trains_and_resumes(follow(tmp_path, kind, guided))


@pytest.mark.parametrize("kind", ALONE)
def test_adapters_on_the_teachers_own_weights(kind: str, tmp_path: Path) -> None:
    write_latents(tmp_path / "shards")
    write_networks(tmp_path)
    trains_and_resumes(follow(tmp_path, kind, {}, student__adapter=LORA))


@pytest.mark.parametrize("kind", ALONE)
def test_beside_stage_2(kind: str, tmp_path: Path) -> None:
    write_latents(tmp_path / "shards")
    trains_and_resumes(on_policy(tmp_path, objective={"kind": kind, "velocity": "teacher", "weight": "uniform"}))


@pytest.mark.parametrize("kind", ALONE)
def test_a_causal_student_learns_from_data_and_itself(kind: str, tmp_path: Path) -> None:
    write_latents(tmp_path / "shards", frames=3)
    trains_and_resumes(causal(settings(tmp_path, objective={"kind": kind, "velocity": "data"})))
    refused = causal(follow(tmp_path, kind, {"source": "student"}))
    refused["student"].pop("init")
    keys = {finding.keys[0] for finding in run_errors(RunConfig.model_validate(refused), 1)}
    assert keys == {"objective.velocity"}


def test_prompts_are_refused_where_clips_are_needed(tmp_path: Path) -> None:
    write_prompts(tmp_path / "shards")
    write_networks(tmp_path)
    with pytest.raises(UserError, match="prompts without video"):
        training.run(RunConfig.model_validate(follow(tmp_path, "lagrangian", {})))


@pytest.mark.parametrize("kind", ["lagrangian", "semigroup", "mixed"])
def test_guidance_of_predictions_is_refused_by_key(kind: str, tmp_path: Path) -> None:
    config = settings(tmp_path, objective={"kind": kind, "guidance": "prediction", "guidance_scale": 3.0})
    with pytest.raises(ValueError, match=r"objective.*guidance\n.*Input should be 'none' or 'target'"):
        run_model(kind).model_validate(config)


@pytest.mark.parametrize("kind", [pytest.param("flow_map", marks=pytest.mark.nightly), "mixed"])
def test_the_exact_derivative_trains_and_is_planned(kind: str, tmp_path: Path) -> None:
    write_latents(tmp_path / "shards")
    write_networks(tmp_path)
    config = follow(tmp_path, kind, {"derivative": "jvp"}, student__gradient_checkpointing="block")
    trains_and_resumes(config)
    assert dry_run(RunConfig.model_validate(config), 1).work > 0


def test_the_exact_derivative_of_a_stage_is_planned(tmp_path: Path) -> None:
    """As the difference, like that of a whole run."""
    write_networks(tmp_path)
    exact = {"schedule": [{"steps": 2, "changes": {"objective.derivative": "jvp"}}]}
    configs = [RunConfig.model_validate(follow(tmp_path, "lagrangian", keys)) for keys in ({}, exact)]
    plain, staged = [dry_run(config, 1) for config in configs]
    assert staged.stages == plain.stages * 2


@pytest.mark.parametrize(
    "keys", [{"derivative": "jvp"}, {"schedule": [{"steps": 2, "changes": {"objective.derivative": "jvp"}}]}]
)
def test_the_exact_derivative_is_refused_under_zero_3(keys: dict[str, Any], tmp_path: Path) -> None:
    """Also if only some steps take it."""
    jvp = RunConfig.model_validate(follow(tmp_path, "lagrangian", keys))
    check_strategy(jvp, "zero2")
    check_strategy(RunConfig.model_validate(follow(tmp_path, "lagrangian", {})), "zero3")
    with pytest.raises(UserError, match=r"objective\.derivative: is refused under strategy=zero3"):
        check_strategy(jvp, "zero3")
