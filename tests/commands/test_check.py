"""`anyflow check`: the resolved config, derived quantities, and the derivative's error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from anyflow_train.commands import check
from anyflow_train.config.compose import compose
from anyflow_train.config.derived import table
from anyflow_train.config.network import Architecture
from anyflow_train.config.parameters import layers
from anyflow_train.config.run import RunConfig
from anyflow_train.models.build import network_class
from tests.commands.runs import SHORT
from tests.training.helpers import write_latents

SMALL = Architecture(
    num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=16
)


def test_output_is_the_config_as_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["experiment=wan1_3b_forward", "optimizer.lr=1e-5"]
    assert check.run(given, None) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == compose("train", given).model_dump(mode="json")
    assert "32 = 1 process x 16 accumulation x 2 micro-batch" in printed
    assert "16 diffusion, 8 consistency, 8 free" in printed
    assert "21 frames x 16 channels x 60 x 104" in printed
    assert "32,760 per sample (21 x 30 x 52)" in printed
    assert "# warning" not in printed


def test_several_processes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    config: RunConfig = compose("train", ["experiment=wan14b_forward"])
    rows = dict(table(config, 8))
    assert rows["global batch"] == "16 = 8 processes x 2 accumulation x 1 micro-batch"
    assert rows["samples seen"] == "64,000"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cross_attn_norm": False},
        {"patch_size": (1, 4, 4), "out_channels": 4},
        {"causal": {"compressed_patch_size": (1, 8, 8)}},
    ],
)
def test_layers_are_those_of_the_network(changes: dict[str, object]) -> None:
    architecture = Architecture.model_validate(SMALL.model_dump() | changes)
    with torch.device("meta"):
        network = network_class(architecture.arguments())(**architecture.arguments())
    own = {name for name, module in network.named_modules() if any(True for _ in module.parameters(recurse=False))}
    blocks = {f"blocks.{number}" for number in range(architecture.num_layers)}
    modules = {name: network.get_submodule(name) for name in own - blocks - {""}}
    assert layers(architecture) == {
        name: (module.in_features, module.out_features) if isinstance(module, torch.nn.Linear) else None
        for name, module in modules.items()
    }


def test_derivative_on_a_runs_weights_and_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_latents(tmp_path / "shards")
    given = [*SHORT, f"data.shards={tmp_path / 'shards'}", "derivative=true", "derivative_epsilons=[0.0001,0.05]"]
    assert check.run([*given, "derivative_samples=8"], None) == 0
    rows = [line.lstrip("# ").split() for line in capsys.readouterr().out.splitlines() if "%" in line]
    errors = {(row[0], row[1]): [float(cell.rstrip("%")) for cell in row[2:]] for row in rows}
    assert set(errors) == {(name, span) for name in ("fp32", "fp16", "bf16") for span in ("0.0001", "0.05")}
    # A float32 difference over a short span of a smooth network is the derivative; bfloat16 loses it in rounding there.
    assert errors["fp32", "0.0001"][0] == 0
    assert errors["fp32", "0.0001"][1] < errors["fp32", "0.05"][1]
    assert errors["fp32", "0.0001"][1] < 5 < errors["bf16", "0.0001"][1]
    # float16 keeps three bits more, a rounding of an eighth.
    assert all(3 * errors["fp16", span][0] < errors["bf16", span][0] for span in ("0.0001", "0.05"))
