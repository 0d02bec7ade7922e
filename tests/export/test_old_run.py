"""Runs that version 0.1.0 trained are read by every later version.

`old_run` holds two run directories as that version left them, three steps each, and all that they refer to: a random
pipeline and shards of random latents. `trained/full` trained the whole network; `trained/lora` started from it with
adapters and one module that is trained whole. Never write these files again: they stand for the files of users.
`velocities.safetensors` and `resumed_to_step_5.safetensors` are what that version computed from them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from anyflow_train.config.commands import ExportConfig
from anyflow_train.evaluation.load import load_model
from anyflow_train.export import run as export
from anyflow_train.export import verify
from anyflow_train.training.checkpoints.config_file import under_new_names
from tests.training.helpers import final_tensors, train


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy of the old runs as the working directory, because the paths in their configs are relative."""
    folder = shutil.copytree(Path(__file__).parent / "old_run", tmp_path / "old")
    monkeypatch.chdir(folder)
    return folder


def assert_as_before(network, name: str) -> None:
    expected = load_file("velocities.safetensors")[name]
    found = verify.flow_map_outputs(network, verify.Probe.of(network.config))
    # float32; other machines and versions of torch sum in another order.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", ["full", "lora"])
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_it_is_loaded_for_sampling(old_run: Path, run: str, weights: str) -> None:
    assert_as_before(load_model(f"trained/{run}", weights).network, f"{run}.{weights}")


@pytest.mark.parametrize("run", ["full", "lora"])
def test_it_is_exported(old_run: Path, run: str) -> None:
    export(ExportConfig(model=f"trained/{run}", out="out", precision="fp32"))
    pipeline = diffusers.AnyFlowPipeline.from_pretrained("out")
    assert_as_before(pipeline.transformer, f"{run}.ema")
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline("red", height=32, width=32, num_frames=5, num_inference_steps=1, output_type="pt").frames
    assert torch.isfinite(video).all()


def test_it_is_resumed(old_run: Path) -> None:
    config = under_new_names(json.loads(Path("trained/lora/config.json").read_text()), "trained/lora")
    train({**config, "steps": 5})
    found, expected = final_tensors(Path("trained/lora"), 5), load_file("resumed_to_step_5.safetensors")
    for name, average in expected.items():
        torch.testing.assert_close(found[f"ema-00001.safetensors: {name}"], average, rtol=1e-3, atol=1e-4)


def test_another_run_starts_from_it(old_run: Path) -> None:
    config = under_new_names(json.loads(Path("trained/lora/config.json").read_text()), "trained/lora")
    student = {**config["student"], "init": "trained/lora"}
    run = train({**config, "name": "new", "student": student, "steps": 1})
    assert (run / "done.json").exists()
