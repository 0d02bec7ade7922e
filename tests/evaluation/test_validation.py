"""Validation inside of a run, with flow maps whose samples are known."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from anyflow_train.config.run import RunConfig
from anyflow_train.data.shards import ShardSet
from anyflow_train.errors import UserError
from anyflow_train.evaluation.low_memory import decode_in_parts
from anyflow_train.evaluation.oracle import wilson
from anyflow_train.evaluation.validation import InRunValidator, build_validator
from anyflow_train.flow.types import Condition
from anyflow_train.models.codec import Codec
from anyflow_train.tiny import shapes
from anyflow_train.training.processes.world import World
from anyflow_train.training.validation import Validation
from tests.evaluation.distances import energy_distance
from tests.training.helpers import SHAPE, settings, write_latents

EVALUATION = {"every": 1, "calls": [1, 2], "samples": 6, "batch": 4, "videos": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_latents(folder / "shards", samples=5)
    return folder


def validator_of(folder: Path, **changes: Any) -> InRunValidator:
    evaluation = {**EVALUATION, "held_out": str(folder / "shards"), **changes}
    config = RunConfig.model_validate(settings(folder, evaluation=evaluation))
    return build_validator(config, World(torch.device("cpu")))


def stay(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
    """Return a zero velocity: the flow map that does not change the noise."""
    return torch.zeros_like(x)


def go(interrupted: bool = False) -> Any:
    return lambda: interrupted


def test_metrics_are_of_the_samples_from_fixed_noise(folder: Path) -> None:
    validator = validator_of(folder)
    assert validator.compared is not None
    assert validator.compared.captions[-1] == validator.compared.captions[0]  # 5 held-out prompts, 6 samples
    assert len(validator.compared.noise.unique(dim=0)) == 6
    validation = validator(stay, folder, go())
    assert validation is not None
    shards = ShardSet.open(str(folder / "shards"))
    real = torch.stack([sample.latents for i in range(5) if (sample := shards.read(i)).latents is not None])
    expected = energy_distance(validator.compared.noise, real)
    assert validation.metrics["energy_distance_1"] == pytest.approx(expected)
    assert validation.metrics["energy_distance_2"] == pytest.approx(expected)
    for name, value in validation.metrics.items():
        assert validation.intervals[f"{name}_low"] <= value <= validation.intervals[f"{name}_high"]
    assert validation.videos == {}


def test_every_number_is_printed_with_its_interval() -> None:
    ends = {"energy_distance_1_low": 0.4321, "energy_distance_1_high": 0.6}
    validation = Validation({"energy_distance_1": 0.5123, "other": 2.0}, {}, ends)
    assert validation.summary() == "energy_distance_1 0.512 [0.43, 0.6]  other 2"


def test_the_class_error_is_that_of_the_oracle_with_its_interval(folder: Path) -> None:
    validator = validator_of(folder)
    clips, labels = shapes.draw_clips(6, seed=0)
    captions = tuple(shapes.CAPTIONS[label] for label in labels)
    captions = (captions[1], *captions[1:])  # the first one is wrong
    assert validator.compared is not None
    assert validator.held_out is not None
    validator = dataclasses.replace(
        validator,
        config=validator.config.model_copy(update={"oracle": "shapes"}),
        compared=dataclasses.replace(validator.compared, captions=captions),
        held_out=dataclasses.replace(validator.held_out, latents=clips[:5]),
        codec=SimpleNamespace(decode_video=lambda latents: latents),  # type: ignore[arg-type]  # videos are latents here
    )
    metrics = validator._metrics({1: clips})
    assert metrics["class_error_1"].value == pytest.approx(1 / 6)
    right = wilson(5, 6)
    assert (metrics["class_error_1"].low, metrics["class_error_1"].high) == (1 - right.high, 1 - right.low)


def test_every_validation_and_every_start_sees_the_same_noise(folder: Path) -> None:
    first, second = validator_of(folder), validator_of(folder)
    assert first.compared is not None
    assert second.compared is not None
    assert torch.equal(first.compared.noise, second.compared.noise)
    other = validator_of(folder, seed=1).compared
    assert other is not None
    assert not torch.equal(first.compared.noise, other.noise)


def test_it_tells_which_set_of_samples_it_makes(folder: Path) -> None:
    shown: list[tuple[int, int]] = []
    validator_of(folder)(stay, folder, go(), lambda part, parts: shown.append((part, parts)))
    assert shown == [(1, 2), (2, 2)]  # 1 and 2 calls


def test_a_stop_request_ends_it_at_once(folder: Path) -> None:
    assert validator_of(folder)(stay, folder, go(interrupted=True)) is None


def test_without_held_out_data_there_are_no_numbers(folder: Path) -> None:
    validation = validator_of(folder, held_out=None)(stay, folder, go())
    assert validation is not None
    assert validation.metrics == {}


def test_videos_are_written_as_one_grid(folder: Path, tmp_path: Path) -> None:
    validator = validator_of(folder)
    assert validator.compared is not None
    shown = dataclasses.replace(validator.compared, captions=("a", "b"), text=validator.compared.text[:2])
    shown = dataclasses.replace(shown, noise=validator.compared.noise[:2])
    validation = dataclasses.replace(validator, shown=shown, codec=small_codec())(stay, tmp_path, go())
    assert validation is not None
    assert validation.videos == {"grid": tmp_path / "grid.mp4"}
    assert (tmp_path / "grid.mp4").stat().st_size > 0


class Full:
    """A GPU whose memory holds a few samples: a flow map that does not change the noise, and the sizes it was given."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.seen: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros_like(x)


def test_a_batch_that_does_not_fit_is_sampled_in_parts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validator, full = validator_of(folder, calls=[1], samples=7, batch=4), Full(1)
    whole, parts = validator(stay, folder, go()), validator(full, folder, go())
    assert whole is not None
    assert parts == whole
    assert full.seen == [4, 2, 1, 1, 2, 1, 1, 3, 2, 1, 1, 1]
    assert "warning: validation: 4 samples do not fit into memory" in capsys.readouterr().err


def test_a_validation_that_does_not_fit_is_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validator_of(folder, calls=[1])(Full(0), folder, go()) is None
    warning = capsys.readouterr().err
    assert "warning: validation: one sample does not fit into memory, left out; the run goes on" in warning
    assert "micro_batch" not in warning


def test_processes_that_share_a_forward_name_the_key_of_validation(folder: Path) -> None:
    validator = dataclasses.replace(validator_of(folder), world=World(torch.device("cpu"), 0, 2, 2))
    with pytest.raises(UserError, match=r"^evaluation\.batch: 4 samples of validation need more memory"):
        validator(Full(1), folder, go())


def small_codec() -> Codec:
    torch.manual_seed(0)
    sizes = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    statistics = {"latents_mean": [0.0] * SHAPE[1], "latents_std": [1.0] * SHAPE[1]}
    vae = AutoencoderKLWan(z_dim=SHAPE[1], **sizes, **statistics).eval()  # pyright: ignore[reportArgumentType]
    return Codec("", vae, torch.device("cpu"), torch.float32)


def test_decoding_that_does_not_fit_is_done_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, latents = small_codec(), torch.randn(2, *SHAPE)
    expected, original = codec.decode_video(latents), codec.vae.decode

    def full(raw: Tensor, **options: Any) -> Any:
        if not codec.vae.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(raw, **options)

    monkeypatch.setattr(codec.vae, "decode", full)
    # one tile covers such small videos
    assert torch.allclose(decode_in_parts(codec, latents), expected, atol=1e-4)
    assert not codec.vae.use_tiling


def test_a_decoder_that_does_not_fit_leaves_the_validation_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    codec, validator = small_codec(), validator_of(folder, calls=[1])
    monkeypatch.setattr(codec.vae, "decode", full)
    assert dataclasses.replace(validator, shown=validator.compared, codec=codec)(stay, folder, go()) is None
    assert "decoding does not fit into memory, left out; the run goes on" in capsys.readouterr().err


def test_the_vae_is_on_the_device_only_while_it_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, gpu, moved = small_codec(), torch.device("cuda", 0), []
    monkeypatch.setattr(codec.vae, "to", moved.append)
    with codec.on(gpu):
        assert (codec.device, moved) == (gpu, [gpu])
    assert (codec.device, moved) == (torch.device("cpu"), [gpu, torch.device("cpu")])
