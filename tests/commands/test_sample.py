"""Videos from the command line: what is written, from what noise, and what is refused."""

import json
import warnings
from pathlib import Path

import av
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from anyflow_train import export
from anyflow_train.commands import sample
from anyflow_train.config.commands import ExportConfig, SampleConfig
from anyflow_train.config.compose import compose
from anyflow_train.data import captions
from anyflow_train.data.prepare.video import read_clip
from anyflow_train.errors import ConfigWarning, UserError
from anyflow_train.evaluation.load import load_model
from anyflow_train.evaluation.video import to_frames, write_mp4
from anyflow_train.models.codec import Codec
from tests.export.runs import CHUNKS, FULL, LORA, TINY_WAN, make_run


def config(model: Path, out: Path, **options) -> SampleConfig:
    settings = {"prompts": ("a red ball",), "precision": "fp32", "text_length": 16, "device": "cpu"}
    return SampleConfig(model=str(model), out=str(out), **{**settings, **options})


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_run_gives_a_video_for_every_prompt_seed_and_number_of_calls(tmp_path: Path):
    trained, prompts = make_run(tmp_path, LORA), tmp_path / "prompts.txt"
    prompts.write_text("a blue square, moving UP!\n\na red ball\n")
    out = tmp_path / "out"
    sample.run(config(trained, out, prompt="a red ball", prompts=(str(prompts),), calls=(1, 2), seeds=(3, 4)))
    files = [video["file"] for video in json.loads((out / "index.json").read_text())["videos"]]
    assert len(files) == 2 * 2 * 2
    assert files[0] == "000_a-red-ball_seed3_calls1.mp4"
    assert files[-1] == "001_a-blue-square-moving-up_seed4_calls2.mp4"
    assert all(frames_in(out / file) == 5 for file in files)
    assert frames_in(out / "grid.mp4") == 5
    index = json.loads((out / "index.json").read_text())
    assert (index["model"], index["step"], index["height"]) == ("run", 7, 32)
    assert len(index["videos"]) == 8


def test_an_exported_folder_gives_what_stock_diffusers_gives(tmp_path: Path):
    exported = tmp_path / "exported"
    trained = make_run(tmp_path, FULL)
    export.run(ExportConfig(model=str(trained), out=str(exported), precision="fp32"))
    written: list[np.ndarray] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "write_mp4", lambda path, frames, fps: written.append(frames))
        sample.run(config(exported, tmp_path / "out", calls=(2,), seeds=(5,)))
    pipeline = diffusers.AnyFlowPipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        "a red ball", height=32, width=32, num_frames=5, num_inference_steps=2, max_sequence_length=16,
        generator=torch.Generator().manual_seed(5), output_type="pt",
    ).frames[0]  # fmt: skip
    stock = to_frames(video.transpose(0, 1) * 2 - 1)
    # Rounding to whole grey values may fall to either side.
    assert np.abs(written[0].astype(int) - stock.astype(int)).max() <= 1


def test_a_wan_transformer_is_sampled_by_euler_steps(tmp_path: Path):
    make_run(tmp_path, FULL)
    assert load_model(str(tmp_path / "base"), "ema").network.config["gate_value"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ()}, "prompts: is empty"),
        ({"prompts": ("missing.txt",)}, r"prompts: 'missing\.txt' cannot be read: No such file or directory"),
        ({"frames": 6}, r"frames: 6 frames are not 4n \+ 1; nearest are 5 and 9"),
        ({"height": 40}, "height: 40 pixels are not a multiple of 16"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        sample.run(config(make_run(tmp_path, FULL), tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("written", "prompts"),
    [
        (["prompt=a red panda, on a branch"], ["a red panda, on a branch"]),
        (['prompt=it\'s "one": [a], {b}'], ['it\'s "one": [a], {b}']),
        (["prompt='quoted, already'"], ["quoted, already"]),
        (["prompt=a backslash at the end \\"], ["a backslash at the end \\"]),
        (["prompts=[a ball,a cube]", "prompt=first, of three"], ["first, of three", "a ball", "a cube"]),
        (["prompts=[a ball,a ball]"], ["a ball"]),
    ],
)
def test_prompts_of_the_command_line(written: list[str], prompts: list[str]):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sample.read_prompts(compose("sample", ["model=m", "out=o", *written])) == prompts


def test_a_sentence_that_was_cut_is_noticed():
    with pytest.warns(ConfigWarning, match="2 prompts that look like one sentence"):
        sample.read_prompts(compose("sample", ["model=m", "out=o", "prompts=[a red panda, on a branch]"]))


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("prompt_file=x.txt", "prompt_file: is now called prompts"),
        ("prompts=3", r"prompts.0: 3 is wrong: it should be a valid string"),
        ("prompt=", "prompt: is empty"),
    ],
)
def test_mistakes_in_prompts(written: str, problem: str):
    with pytest.raises(UserError, match=problem):
        compose("sample", ["model=m", "out=o", written])


def write_clip(path: Path, frames: int) -> Path:
    steps = np.linspace(0, 255, frames, dtype=np.uint8)
    write_mp4(path, np.broadcast_to(steps[:, None, None, None], (frames, 48, 64, 3)), 16)
    return path


@pytest.mark.parametrize(
    ("key", "options", "given"),
    [
        ("image", {}, 1),
        ("video", {}, 5),  # two latent frames are the most whole chunks that leave one
        ("video", {"context_frames": 1}, 1),
    ],
)
def test_a_causal_model_goes_on_from_what_it_is_given(tmp_path: Path, key: str, options: dict, given: int):
    trained = make_run(tmp_path, FULL, causal=CHUNKS)
    clip = write_clip(tmp_path / "clip.mp4", 9)
    if key == "image":
        clip = tmp_path / "frame.png"
        Image.fromarray(np.full((40, 50, 3), 200, np.uint8)).save(clip)
    wanted = read_clip(clip, given, 32, 32, 16.0)
    codec = Codec.load(TINY_WAN, "cpu")
    seen: list[torch.Tensor] = []

    class Watched(Codec):
        def decode_video(self, latents: torch.Tensor) -> torch.Tensor:
            seen.append(latents)
            return super().decode_video(latents)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "Codec", Watched)
        sample.run(config(trained, tmp_path / "out", calls=(2,), **{key: str(clip)}, **options))
    expected = codec.encode_video(wanted[None])
    assert expected.shape[1] == (given - 1) // 4 + 1
    assert torch.equal(seen[0][:, : expected.shape[1]], expected)
    assert seen[0].shape[1] == 3


def test_a_student_that_has_seen_conditioning_frames_goes_on_from_an_image(tmp_path: Path):
    trained = make_run(tmp_path, FULL, i2v_probability=0.2)
    clip = write_clip(tmp_path / "clip.mp4", 5)
    sample.run(config(trained, tmp_path / "out", calls=(1,), video=str(clip)))
    assert len(json.loads((tmp_path / "out" / "index.json").read_text())["videos"]) == 1


@pytest.mark.parametrize(
    ("causal", "options", "message"),
    [
        (CHUNKS, {"video": "missing.mp4"}, r"video: 'missing\.mp4' does not exist"),
        (CHUNKS, {"height": 48}, "height: 48 pixels are not a multiple of 32"),
        (CHUNKS, {"video": "clip.mp4", "context_frames": 9}, "context_frames: 9 pixel frames are 3 latent frames, but"),
        (CHUNKS, {"frames": 5}, r"chunk_partition: \[1, 1, 1\] sums to 3, but frames=5 gives 2"),
        (None, {"image": "frame.png"}, "image: 'frame.png', but run was trained without conditioning frames"),
        (None, {"chunk_partition": (1, 1)}, "generates all frames together"),
        (
            {},
            {"video": "clip.mp4", "context_frames": 9},
            "context_frames: 9 pixel frames are 3 latent frames, and the clip has 2",
        ),
    ],
)
def test_what_cannot_be_gone_on_from_is_named(tmp_path: Path, causal: dict | None, options: dict, message: str):
    seen = {"i2v_probability": 0.5} if causal == {} else {}  # a student of whole clips that goes on from frames
    trained = make_run(tmp_path, FULL, causal=causal or None, **seen)
    write_clip(tmp_path / "clip.mp4", 9)
    options = {key: str(tmp_path / value) if value == "clip.mp4" else value for key, value in options.items()}
    with pytest.raises(UserError, match=message):
        sample.run(config(trained, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_model_of_unknown_size_asks_for_it(tmp_path: Path):
    make_run(tmp_path, FULL)
    with pytest.raises(UserError, match="width: is not set"):
        sample.run(config(tmp_path / "base", tmp_path / "out", frames=5, height=32))


def test_a_file_of_prompts_may_have_any_name(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text("a cat\n\na dog\n")
    assert captions.read_prompts([str(path)], "prompts") == ("a cat", "a dog")
    assert captions.read_prompts([str(tmp_path)], "prompts") == (str(tmp_path),)
