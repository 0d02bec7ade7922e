"""The folder of the tiny pipeline's frozen parts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from transformers import AutoTokenizer, UMT5EncoderModel

from anyflow_train.errors import UserError
from anyflow_train.tiny.codec import train_codec
from anyflow_train.tiny.vae import CodecSettings, Phase

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
