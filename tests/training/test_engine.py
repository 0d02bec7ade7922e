"""The engine on small real modules, against plain torch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from anyflow_train.config.network import Architecture
from anyflow_train.config.run import Optimizer
from anyflow_train.errors import UserError
from anyflow_train.models.build import build_network
from anyflow_train.training.checkpoints.tensor_handle import read_entries
from anyflow_train.training.engine import (
    ReplicatedEngine,
    adam_steps,
    engine_name,
    set_adam_steps,
    zero,
    zero_stage,
)
from anyflow_train.training.processes.world import World

CPU = World(torch.device("cpu"))
NOTHING = torch.zeros(0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def data() -> torch.Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1))


def engine_of(module: nn.Module, **options: float) -> ReplicatedEngine:
    return ReplicatedEngine(
        CPU, module, dict(module.named_parameters()), Optimizer.model_validate({"lr": 0.1, **options})
    )


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_steps_equal_plain_torch_with_clipping() -> None:
    ours, theirs = network(), network()
    engine = engine_of(ours, clip_norm=0.05, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        engine.backward(ours(data()).square().mean())
        outcome = engine.step(0.1, NOTHING)
        theirs(data()).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        reference.step()
        reference.zero_grad()
        assert outcome.gradient_norm == pytest.approx(float(norm), rel=1e-5)
    # the fused and the plain kernel differ by float32 rounding; Adam's normalisation keeps that relative to lr
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-5, rtol=1e-5)


def test_four_micro_batches_give_the_gradient_of_one() -> None:
    whole, parts = network(), network()
    whole(data()).square().mean().backward()
    engine = engine_of(parts)
    for chunk in data().chunk(4):
        engine.backward(parts(chunk).square().sum() / 8)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, atol=1e-7, rtol=1e-5)  # sums in another order


def test_a_step_forgets_its_gradients() -> None:
    module = network()
    engine = engine_of(module)
    engine.backward(module(data()).sum())
    engine.step(0.1, NOTHING)
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("poison", ["gradient", "watched"])
def test_a_non_finite_step_changes_nothing(poison: str) -> None:
    module = network()
    engine = engine_of(module)
    engine.backward(module(data()).square().mean())
    engine.step(0.1, NOTHING)
    before = {
        kind: [t.clone() for _, t in read_entries(engine.entries(kind))]
        for kind in ("weights", "exp_avg", "exp_avg_sq")
    }
    scale = math.nan if poison == "gradient" else 1.0
    engine.backward(module(data()).mean() * scale)
    outcome = engine.step(0.1, torch.tensor([1.0, math.inf if poison == "watched" else 2.0]))
    assert not outcome.applied
    assert adam_steps(engine.optimizer) == 1
    for kind, tensors in before.items():
        for old, (_, new) in zip(tensors, read_entries(engine.entries(kind)), strict=True):
            assert torch.equal(old, new)


def test_a_parameter_without_gradient_keeps_adams_count_in_step() -> None:
    module = network()
    unused = nn.Parameter(torch.ones(2))
    engine = ReplicatedEngine(CPU, module, {"unused": unused, **dict(module.named_parameters())}, Optimizer(lr=0.1))
    engine.backward(module(data()).mean())
    assert engine.step(0.1, NOTHING).applied
    assert adam_steps(engine.optimizer) == 1
    assert torch.equal(unused, torch.ones(2))


def test_restored_moments_and_count_continue_bit_exactly() -> None:
    module = network()
    engine = engine_of(module)
    for _ in range(3):
        engine.backward(module(data()).square().mean())
        engine.step(0.1, NOTHING)
    copy = network()
    restored = engine_of(copy)
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        places = restored.entries(kind)
        for name, tensor in read_entries(engine.entries(kind)):
            places[name].write(tensor)
    set_adam_steps(restored.optimizer, adam_steps(engine.optimizer))
    for one, other in ((module, engine), (copy, restored)):
        other.backward(one(data()).square().mean())
        other.step(0.1, NOTHING)
    assert torch.equal(weights(module), weights(copy))


def test_masters_must_be_float32() -> None:
    with pytest.raises(ValueError, match="float32"):
        engine_of(network().to(torch.bfloat16))


def test_the_engine_needs_no_launcher_package() -> None:
    code = "import sys, anyflow_train.training.engine; print({'accelerate', 'deepspeed'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"


class Zero:
    """DeepSpeed's two contexts around a network in shards. They leave buffers where they are, as DeepSpeed does."""

    @staticmethod
    def Init(**_: Any) -> Any:
        return nullcontext()

    @staticmethod
    def GatheredParameters(*_: Any, **__: Any) -> Any:
        return nullcontext()


def test_the_buffers_of_a_network_in_shards_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "_deepspeed", lambda world: SimpleNamespace(zero=Zero))
    monkeypatch.setattr(zero, "_settings", lambda clip_norm: {})
    architecture = Architecture(num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=1, freq_dim=16)
    arguments = {**architecture.arguments(), "gate_value": 0.25}
    whole = build_network(arguments, 0, None)
    weights, elsewhere = dict(whole.named_parameters()), torch.device("meta")
    found = zero.build_sharded(lambda: build_network(arguments, 1, None), weights.__getitem__, World(elsewhere))
    devices = {name: buffer.device for name, buffer in found.named_buffers()}
    assert "condition_embedder.delta_emb_gate" in devices
    assert set(devices.values()) == {elsewhere}
    assert all(torch.equal(parameter, weights[name]) for name, parameter in found.named_parameters())


@pytest.mark.parametrize(
    ("content", "stage", "name"),
    [
        ({"stage": 1}, 1, "zero1"),
        ({"stage": 3}, 3, "zero3"),
        ({"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}, 3, "zero3_offload"),
        ({"stage": "auto"}, 2, "zero2"),
    ],
)
def test_the_user_s_own_deepspeed_file_decides_on_the_strategy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, Any], stage: int, name: str
) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": content}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "own.json"))
    assert (zero_stage(), engine_name()) == (stage, name)


def test_a_deepspeed_file_that_cannot_be_used_is_refused_by_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.json"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(own))
    parts = ({"stage": "three"}, {"stage": 4}, {"offload_param": "cpu"}, {"offload_optimizer": {"device": "disk"}})
    damaged = [json.dumps({"zero_optimization": part}) for part in parts]
    for text in (None, "{", "{}", '{"zero_optimization": 3}', '{"zero_optimization": []}', *damaged):
        if text is not None:
            own.write_text(text)
        with pytest.raises(UserError, match=r"deepspeed_config_file: .*own\.json cannot be used"):
            engine_name()
    own.write_text('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}')
    with pytest.raises(
        UserError, match=r"zero_optimization\.offload_optimizer\.device: is nvme, which is not supported"
    ):
        engine_name()
