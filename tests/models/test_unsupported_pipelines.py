"""Teachers that the student is not built for are refused, with the difference and what is supported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anyflow_train.errors import UserError
from anyflow_train.models.pretrained import open_pretrained
from tests.models.networks import small_wan

# JSON files as published on the hub, without what does not matter here.
WAN_INDEX = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
A14B = {**WAN_INDEX, "boundary_ratio": 0.875, "transformer_2": ["diffusers", "WanTransformer3DModel"]}
TI2V = {**WAN_INDEX, "boundary_ratio": None, "expand_timesteps": True, "transformer_2": [None, None]}
WAN22_VAE = {"_class_name": "AutoencoderKLWan", "z_dim": 48, "scale_factor_spatial": 16, "scale_factor_temporal": 4}
UNIPC = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 3.0}
DDIM = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "Wan2.2-A14B": ({"model_index": A14B}, r"two transformers \(transformer_2, boundary_ratio=0\.875\)"),
    "Wan2.2-TI2V-5B": ({"model_index": TI2V, "vae/config": WAN22_VAE}, "expand_timesteps=true"),
    "the VAE of TI2V-5B": ({"vae/config": WAN22_VAE}, "a VAE with scale_factor_spatial=16 instead of 8"),
    "a VAE of other channels": ({"vae/config": {"z_dim": 16}}, "a VAE with z_dim=16 instead of 4"),
    "a VAE of another model": ({"vae/config": {"_class_name": "AutoencoderKL"}}, "_class_name=AutoencoderKL instead"),
    "image to video": ({"model_index": {"_class_name": "WanImageToVideoPipeline"}}, "is a WanImageToVideoPipeline"),
    "noise prediction": ({"scheduler/scheduler_config": DDIM}, "DDIMScheduler with prediction_type=epsilon"),
}


def make(folder: Path, files: dict[str, Any], **changes: Any) -> Path:
    small_wan(**changes).save_pretrained(folder / "transformer")
    for name, content in ({"model_index": WAN_INDEX} | files).items():
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("part", ["", "transformer"])
def test_what_the_student_is_not_built_for_is_refused(tmp_path: Path, case: str, part: str) -> None:
    """A transformer's folder is refused like the pipeline around it."""
    files, message = CASES[case]
    with pytest.raises(UserError, match=f"{message}.*; supported are Wan2\\.1 text-to-video pipelines"):
        open_pretrained(make(tmp_path, files) / part)


def test_a_transformer_that_takes_an_image_beside_the_noise_is_refused(tmp_path: Path) -> None:
    """Wan2.2's image-to-video networks differ from text-to-video ones only by their channels."""
    with pytest.raises(UserError, match="in_channels=9 and out_channels=4"):
        open_pretrained(make(tmp_path, {}, in_channels=9))


def test_a_wan21_pipeline_as_published_is_opened(tmp_path: Path) -> None:
    vae = {"_class_name": "AutoencoderKLWan", "z_dim": 4}
    folder = make(tmp_path, {"scheduler/scheduler_config": UNIPC, "vae/config": vae})
    assert open_pretrained(folder).arguments["in_channels"] == 4


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[1]"])
@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json"])
def test_a_damaged_description_hides_no_half_model(tmp_path: Path, name: str, content: str) -> None:
    folder = make(tmp_path, {"scheduler/scheduler_config": UNIPC})
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: cannot be read"):
        open_pretrained(folder)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[1]", "\x00"])
def test_a_damaged_config_of_a_transformer_is_one_sentence(tmp_path: Path, content: str) -> None:
    folder = make(tmp_path, {})
    (folder / "transformer" / "config.json").write_text(content)
    with pytest.raises(UserError, match="cannot read its config"):
        open_pretrained(folder)
