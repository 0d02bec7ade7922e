"""Adam's 8-bit moments: their size, their difference from float32 moments, and exact resume."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from anyflow_train.config.compose import compose
from anyflow_train.config.run import Optimizer, RunConfig
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.models.build import build_network
from anyflow_train.plan.dry_run import dry_run
from anyflow_train.plan.memory import plan_memory
from anyflow_train.training.engine import ReplicatedEngine, engine_name
from anyflow_train.training.processes.world import ALONE
from anyflow_train.training.start_checks import check_moments, check_strategy
from tests.training.helpers import (
    assert_equal_runs,
    final_tensors,
    in_process,
    settings,
    train,
    train_and_die,
    write_latents,
)

EIGHT = Optimizer(lr=1e-3, moments="8bit")
NOTHING = torch.zeros(0)


def wide(folder: Path, **changes: Any) -> dict[str, Any]:
    """The tiny run, of a width at which some weights are large enough for 8 bits."""
    config = settings(folder, optimizer__moments="8bit", **changes)
    config["student"]["architecture"] |= {"attention_head_dim": 36, "ffn_dim": 64}
    return config


def engine_of(optimizer: Optimizer) -> tuple[nn.Linear, ReplicatedEngine]:
    torch.manual_seed(0)
    network = nn.Linear(96, 80)
    return network, ReplicatedEngine(ALONE, network, dict(network.named_parameters()), optimizer)


def step(network: nn.Linear, engine: ReplicatedEngine, number: int) -> None:
    x = torch.randn(32, 96, generator=torch.Generator().manual_seed(number))
    engine.backward((network(x) - x[:, :80].sin()).square().mean())
    assert engine.step(1e-3, NOTHING).applied


def test_large_weights_have_codes_and_scales_and_small_ones_floats(bitsandbytes: None) -> None:
    _, engine = engine_of(EIGHT)
    entries = {kind: engine.entries(kind) for kind in engine.kinds}
    assert set(entries) == {"weights", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"}
    for kind in ("exp_avg", "exp_avg_sq"):
        assert {name: entry.dtype for name, entry in entries[kind].items()} == {
            "weight": torch.uint8,
            "bias": torch.float32,
        }
        assert {name: tuple(e.shape) for name, e in entries[f"{kind}_scale"].items()} == {"weight": (96 * 80 // 256,)}
    assert engine_of(Optimizer())[1].kinds == ("weights", "exp_avg", "exp_avg_sq")


def test_weights_stay_near_those_of_float32_moments(bitsandbytes: None) -> None:
    """Neighbouring codes differ by at most 1 % of a moment, except the smallest ones (arXiv 2110.02861, figure 3). So
    steps differ by a few percent, and their sums, which are unbiased, by less. A wrong moment or step count would cause
    an error of more than 10 %."""
    (network, engine), (reference, exact) = engine_of(EIGHT), engine_of(Optimizer(lr=1e-3))
    start = network.weight.detach().clone()
    for number in range(60):
        step(network, engine, number)
        step(reference, exact, number)
    moved = (reference.weight - start).norm()
    assert 1e-4 < (network.weight - reference.weight).norm() / moved < 0.05
    torch.testing.assert_close(network.bias, reference.bias, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize(("place", "count"), [("step", 5), ("backward", 11), ("write", 9)])
def test_a_killed_run_ends_bit_equal(place: str, count: int, tmp_path: Path, bitsandbytes: None) -> None:
    write_latents(tmp_path / "shards")
    undisturbed = train(wide(tmp_path, name="undisturbed"))
    process = in_process(train_and_die, wide(tmp_path), place, count)
    process.join(60)
    assert process.exitcode == -9
    assert_equal_runs(train(wide(tmp_path)), undisturbed)
    kept = final_tensors(undisturbed)
    assert {tensor.dtype for name, tensor in kept.items() if name.startswith("exp_avg-")} == {
        torch.uint8,
        torch.float32,
    }


def test_other_moments_are_another_run(tmp_path: Path, bitsandbytes: None) -> None:
    write_latents(tmp_path / "shards")
    train(wide(tmp_path, steps=2))
    with pytest.raises(UserErrors, match=r"optimizer.moments: is 'fp32', but the run began with '8bit'"):
        train({**wide(tmp_path), "optimizer": {**wide(tmp_path)["optimizer"], "moments": "fp32"}})


def test_shards_of_moments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config, plain = (RunConfig.model_validate(settings(Path(), optimizer__moments=each)) for each in ("8bit", "fp32"))
    check_strategy(config, engine_name())
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"^optimizer.moments: .*zero2, which shards the moments; choose ddp, or set"):
        check_strategy(config, engine_name())
    check_strategy(plain, engine_name())


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"requires bitsandbytes, .*; pip install 'anyflow_train\[bitsandbytes\]'"):
        check_moments(EIGHT)


def test_the_plan_counts_what_the_optimizer_keeps(bitsandbytes: None) -> None:
    """Codes, scales, and the float32 moments of small weights have exactly the planned number of bytes."""
    size = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 384, "num_layers": 2, "text_dim": 64}
    given = [f"student.architecture.{name}={value}" for name, value in size.items()]
    config = compose("train", ["experiment=tiny", "optimizer.moments=8bit", *given], None, 1)
    parts = dict(plan_memory(config, dry_run(config, 1), "ddp", 1).state)
    network = build_network({**config.student.architecture.model_dump(exclude={"causal"}), "gate_value": 0.25}, 0)
    engine = ReplicatedEngine(ALONE, network, dict(network.named_parameters()), config.optimizer)
    kept = {torch.uint8: 0, torch.float32: 0}
    for kind in ("exp_avg", "exp_avg_sq"):
        for name, entry in engine.entries(kind).items():
            kept[entry.dtype] += entry.read().nbytes
            if name in engine.entries(f"{kind}_scale"):
                kept[torch.uint8] += engine.entries(f"{kind}_scale")[name].read().nbytes
    assert parts["Adam's moments (float32)"] == kept[torch.float32]
    assert parts["Adam's moments (8 bits)"] == kept[torch.uint8]
