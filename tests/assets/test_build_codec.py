"""Folder of the tiny pipeline's frozen parts, and the command that makes it."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from transformers import AutoTokenizer, UMT5EncoderModel

from anyflow_train.errors import UserError
from build_codec import main, read_settings, train_codec
from world_vae import CodecSettings, Phase

ASSET = Path(__file__).resolve().parents[2] / "assets" / "tiny-wan"
ONE_STEP = CodecSettings(
    joint=Phase(steps=1, batch=1, learning_rate=1e-3),
    decoder=Phase(steps=1, batch=1, learning_rate=1e-3),
    joint_frames=5,
    statistics_clips=2,
    judged_clips=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "deep" / "tiny-wan"
    train_codec(ONE_STEP, out, report=lambda line: None)
    return out


def test_the_parts_load_as_a_wan_pipeline_has_them(folder: Path) -> None:
    weights = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    assert len(vae.config["latents_mean"]) == len(vae.config["latents_std"]) == 16
    assert min(vae.config["latents_std"]) > 0
    assert UMT5EncoderModel.from_pretrained(folder / "text_encoder").config.d_model == 64
    assert AutoTokenizer.from_pretrained(folder / "tokenizer").model_max_length == 512
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler").config["shift"] == 5.0
    assert [path.name for path in folder.parent.iterdir()] == ["tiny-wan"]


def test_a_finished_folder_is_left_alone(folder: Path) -> None:
    lines: list[str] = []
    train_codec(ONE_STEP, folder, report=lines.append)
    assert len(lines) == 1
    assert "complete" in lines[0]


def test_a_folder_of_another_recipe_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="tiny-wan"):
        train_codec(replace(ONE_STEP, seed=1), folder, report=lambda line: None)


def test_the_shipped_asset_was_made_with_the_default_recipe() -> None:
    assert read_settings(json.loads((ASSET / "codec.json").read_text())) == CodecSettings()


def test_a_recipe_may_set_some_keys() -> None:
    changed = read_settings({"seed": 3, "joint": {"steps": 1, "batch": 2, "learning_rate": 0.5}})
    assert changed == CodecSettings(seed=3, joint=Phase(1, 2, 0.5))


def test_an_unknown_setting_ends_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.json").write_text('{"step": 1}')
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "codec"), "--settings", str(tmp_path / "recipe.json")])
    assert "'step'" in capsys.readouterr().err
    assert not (tmp_path / "codec").exists()


def test_the_wheel_holds_the_asset_without_its_builder() -> None:
    project = tomllib.loads((ASSET.parents[1] / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    carried = {name for name in wheel["force-include"] if name.startswith("assets")}
    present = {f"assets/{folder.name}/{path.name}" for folder in ASSET.parent.iterdir() for path in folder.iterdir()}
    assert carried == present - {"assets/tiny-wan/build"}
