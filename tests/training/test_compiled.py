"""A compiled run: the same training, and no compilation after its first steps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.config.chunks import Chunks
from anyflow_train.config.run import RunConfig
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.types import Condition
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.training.processes.world import ALONE
from anyflow_train.training.recipe import build_recipe
from anyflow_train.training.trainer import Trainer
from tests.training.helpers import (
    SHAPE,
    TEXT_DIM,
    causal,
    final_tensors,
    settings,
    train,
    write_latents,
    write_networks,
)


def both_backends(step: int) -> list[Any]:
    """Return parameters of `settles`. That captured graphs have right backwards, test_recompute tests every day."""
    return [(step, "eager"), pytest.param((step, "aot_eager"), marks=pytest.mark.nightly)]


@pytest.fixture
def settles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From some step on, a compilation is an error. No code is generated, which takes a CPU minutes.

    The backend "eager" only captures graphs; "aot_eager" also derives their backward, at three times the cost.
    """
    original, (settled, backend) = Trainer._step, request.param
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))

    def step(trainer: Trainer, batches: Any) -> None:
        stance = "fail_on_recompile" if trainer.state.step >= settled else "default"
        with torch.compiler.set_stance(stance):
            original(trainer, batches)

    monkeypatch.setattr(Trainer, "_step", step)
    torch._dynamo.reset()
    limits = ("recompile_limit", "accumulated_recompile_limit")  # which a run raises
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in limits}):
        yield


# By then a run has met both text lengths and every mix of branches in a micro-batch.
@pytest.mark.parametrize("settles", both_backends(4), indirect=True)
def test_a_run_compiles_in_its_first_steps_only(tmp_path: Path, settles: None) -> None:
    """Accumulate gradients: the number of difference forwards depends on a micro-batch's branches, and the number of
    forwards for the negative prompt on its texts."""
    write_latents(tmp_path / "shards")
    options = {"engine__micro_batch": 2, "student__gradient_checkpointing": "selective", "steps": 8}
    options |= {"objective__guidance": "target", "objective__guidance_scale": 3.0, "objective__text_dropout": 0.4}
    assert_same_training(settings(tmp_path, **options))


@pytest.mark.parametrize("settles", [(0, "eager")], indirect=True)
def test_a_teacher_of_its_own_is_compiled_too(tmp_path: Path, settles: None) -> None:
    write_networks(tmp_path)
    options = {"teacher": {"source": str(tmp_path / "teacher"), "codec": "none"}, "objective__velocity": "teacher"}
    found = {}
    for compiled in (False, True):
        config = settings(tmp_path, **options, engine__compile=compiled)
        teacher = build_recipe(RunConfig.model_validate(config), ALONE).roles.teacher
        assert isinstance(teacher, NetworkFlowMap)
        assert all((block._compiled_call_impl is not None) == compiled for block in teacher.network.blocks)
        x, t = torch.ones(1, *SHAPE), torch.tensor([0.5])
        with torch.no_grad():
            found[compiled] = teacher(x, t, t, Condition(torch.ones(1, 4, TEXT_DIM)))
    torch.testing.assert_close(found[True], found[False], rtol=1e-5, atol=1e-5)


# faster: test_compiles_whole_and_once of the causal network, test_recompute's compiled causal blocks, and the run above
@pytest.mark.nightly
@pytest.mark.parametrize("settles", [(6, "eager"), (6, "aot_eager")], indirect=True)
def test_a_causal_student_is_compiled_once_for_each_of_its_sequences(tmp_path: Path, settles: None) -> None:
    """Train on one chunk, two chunks, two chunks after a context, and on whole clips, with a limit of two of three."""
    write_latents(tmp_path / "shards", frames=3)
    options = {"steps": 13, "data__text_lengths": [4], "student__gradient_checkpointing": "selective"}
    config = causal(settings(tmp_path, **options))
    share, draws = config["context"]["long_share"], (Draw(0, step, (0,), torch.device("cpu")) for step in range(13))
    sequences = [Chunks((1, 1, 1), 2).drawn(share, *draw.shared("chunks", 2)) for draw in draws]
    assert len(set(sequences[:6])) == len(set(sequences)) == 3
    assert_same_training(config)


# faster: the run above, and what test_recompute says of blocks
@pytest.mark.nightly
@pytest.mark.parametrize("settles", [(4, "eager"), (4, "aot_eager")], indirect=True)
def test_roles_on_one_base_are_compiled_once_each(tmp_path: Path, settles: None) -> None:
    """Which of them a block computes as is part of what is compiled; rollouts have two jumps in every step."""
    write_latents(tmp_path / "shards")
    write_networks(tmp_path)
    source = str(tmp_path / "network")
    lora = {"kind": "lora", "rank": 2, "alpha": 2.0, "full_modules": ["condition_embedder.delta_embedder"]}
    rate = 10.0  # at which adapters, which begin at nothing, come to count
    fake_score = {"init": source, "adapter": lora, "lr": rate}
    options = {
        "steps": 6,
        "student__init": source,
        "student__adapter": lora,
        "student__gradient_checkpointing": "selective",
        "student__time_frequency_limit": None,
        "teacher": {"source": source, "codec": "none"},
        "on_policy": {"kind": "distribution_matching", "calls": [2], "fake_score": fake_score},
    }
    assert_same_training(settings(tmp_path, data__text_lengths=[4], **options), lr=rate)


def assert_same_training(config: dict[str, Any], lr: float = 0.1) -> None:
    """With an epsilon of 1 Adam's steps are as long as its gradients, so rounding stays rounding; what is saved of the
    moments are the gradients of all steps.
    """
    config = {**config, "optimizer": {**config["optimizer"], "lr": lr, "eps": 1.0}}
    engine = {**config["engine"], "compile": True}
    plain = final_tensors(train({**config, "name": "plain"}))
    compiled = final_tensors(train({**config, "name": "compiled", "engine": engine}))
    for name, tensor in plain.items():
        # Seen: 4e-6, of a difference quotient that multiplies float32's rounding by 100.
        assert (compiled[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
