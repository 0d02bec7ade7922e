"""`anyflow plan`: what it prints, what it advises, and what it refuses."""

from __future__ import annotations

from typing import get_args

import pytest

from anyflow_train.config.commands.types import GpuName, StrategyName
from anyflow_train.config.compose import compose
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.plan import command, fit
from anyflow_train.plan.command import DOES_NOT_FIT, FITS, run
from anyflow_train.plan.fit import STRATEGIES, nearest_fit
from anyflow_train.plan.memory import plan_memory
from anyflow_train.text import GIB
from anyflow_train.training.gpus import GPUS


def test_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["experiment=wan1_3b_forward", "gpus=8", "gpu=h100-80", "price=2"], None) == FITS
    printed = capsys.readouterr().out
    assert "8 x NVIDIA H100 SXM 80 GB, strategy ddp: predicted, not measured" in printed
    assert "32 = 8 processes x 2 accumulation x 2 micro-batch" in printed
    assert "32,760 per sample" in printed
    hours = float(printed.split(" GPU-hours")[0].split()[-1].replace(",", ""))
    cost = float(next(line for line in printed.splitlines() if "  cost" in line).split()[1].replace(",", ""))
    assert cost == pytest.approx(2 * hours, abs=1.5)  # both are rounded to whole numbers


# Sizes of the 1.3B network, in a step of few operations: a dry run takes as long as there are operations.
PLAIN = [
    "experiment=wan1_3b_forward",
    "student/adapter=full",
    "objective.guidance=none",
    "objective.guidance_scale=1",
    "student.gradient_checkpointing=none",
    "evaluation=none",
]


def test_a_causal_student(capsys: pytest.CaptureFixture[str]) -> None:
    """Advice never splits its sequences, which it cannot do."""
    given = ["experiment=tiny_causal", "engine.micro_batch=1"]
    assert run([*given, "gpus=8"], None) == FITS
    assert "1 + 2 + 2 latent frames" in capsys.readouterr().out
    config = compose("train", given, None, 8)
    tried = [setting.config for setting in fit.settings(config, None, "ddp", 8)]
    assert tried
    assert {config.engine.sequence_parallel for config in tried} == {1}


@pytest.mark.nightly  # faster: test_a_causal_student, and test_what_does_not_fit_gets_the_nearest_that_does
def test_advice_for_a_published_causal_student_fits(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["experiment=wan1_3b_causal", "gpus=8", "student.gradient_checkpointing=none", "gpu=l40s-48"]
    assert run(given, None) == DOES_NOT_FIT
    printed = capsys.readouterr().out
    assert "1 + 3 + 3 + 3 + 3 + 3 + 3 + 2 latent frames" in printed
    advised = printed.splitlines()[-1]
    assert "sequence_parallel" not in advised
    assert run([*given, *advised.rpartition(": ")[2].split()], None) == FITS


def test_what_does_not_fit_gets_the_nearest_that_does(capsys: pytest.CaptureFixture[str]) -> None:
    given = [*PLAIN, "gpus=8", "gpu=l40s-48"]
    assert run(given, None) == DOES_NOT_FIT
    advised = capsys.readouterr().out.splitlines()[-1]
    assert "student.gradient_checkpointing=" in advised
    assert run([*given, *advised.rpartition(": ")[2].split()], None) == FITS


def test_the_smallest_change_comes_first() -> None:
    """A micro-batch that is enough is not passed over for ZeRO; the less there is, the more changes."""
    config = compose("train", PLAIN, None, 8)
    planned = command.dry_run(config, 8)
    asked = plan_memory(config, planned, "ddp", 8).total
    changes = []
    for limit in (asked, asked - 1, asked // 2, asked // 4):
        found = nearest_fit(config, None, "ddp", 8, limit, planned)
        assert found is not None
        assert found[1].total <= limit
        changes.append(found[0])
    assert changes[0].changes == ()
    assert changes[1].changes == ("engine.micro_batch=1",)
    assert [setting.size for setting in changes] == sorted(setting.size for setting in changes)
    assert nearest_fit(config, None, "ddp", 8, 1 * GIB, planned) is None


def test_a_strategy_that_distributes_less_is_never_advised() -> None:
    """A run that was started under ZeRO 2 is not told to hold more on each GPU."""
    config = compose("train", PLAIN, None, 8)
    assert {setting.strategy for setting in fit.settings(config, None, "zero2", 8)} == {
        "zero2",
        "zero3",
        "zero3_offload",
    }


EIGHT_BITS = ["experiment=wan14b_forward", "gpus=8", "gpu=l40s-48", "evaluation=none", *PLAIN[2:4], "engine.fp8=frozen"]


@pytest.mark.nightly  # faster: the two tests before the next one
def test_8_bits_are_given_up_where_shards_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(EIGHT_BITS, None) == DOES_NOT_FIT
    advised = capsys.readouterr().out.splitlines()[-1].rpartition(": ")[2].split()
    assert advised[:2] == ["strategy=zero3", "engine.fp8=none"]
    assert run([*EIGHT_BITS[:-1], *advised], None) == FITS


def test_a_plan_refuses_8_bits_where_a_start_does() -> None:
    refused = (
        r"engine.fp8: is refused under strategy=zero3, which shards the weights; choose ddp to zero2, or set it to none"
    )
    with pytest.raises(UserErrors, match=refused):
        run([*EIGHT_BITS, "strategy=zero3"], None)
    refused = r"optimizer.moments: is refused under strategy=zero2, which shards the moments; choose ddp, or set it to"
    with pytest.raises(UserErrors, match=refused):
        run([*EIGHT_BITS[:-1], "optimizer.moments=8bit", "strategy=zero2"], None)


@pytest.mark.nightly  # faster: test_what_does_not_fit_gets_the_nearest_that_does
def test_full_training_that_cannot_fit_is_offered_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["experiment=wan14b_forward", *PLAIN[1:], "gpus=8", "gpu=rtx4090-24"]
    assert run(given, None) == DOES_NOT_FIT
    assert "student/adapter=lora" in capsys.readouterr().out


def test_mistakes_are_reported_as_by_check() -> None:
    """Those of the plan's own keys and of the run's, together."""
    wrong = ["strategy=zero4", "gpu=h100", "data.frames=80", "engine.micro_batches=2"]
    with pytest.raises(UserErrors) as caught:
        run(["experiment=wan1_3b_forward", *wrong], None)
    assert {error.where for error in caught.value.errors} == {"strategy", "gpu", "data.frames", "engine.micro_batches"}
    with pytest.raises(UserErrors, match="global_batch"):
        run(["experiment=wan1_3b_forward", "gpus=7"], None)


def test_the_engine_group_is_not_the_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["experiment=tiny", "engine=cpu", "strategy=zero2", "gpus=1"], None) == FITS
    assert "strategy zero2" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"engine: .*write strategy=zero3$"):
        run(["experiment=tiny", "engine=zero3"], None)


def test_every_gpu_and_strategy_that_can_be_asked_for_is_known() -> None:
    assert set(get_args(GpuName)) == set(GPUS)
    assert set(get_args(StrategyName)) == set(STRATEGIES)
