"""Recipe of the codec: initial weights, penalties, and the weights that each phase changes. Quality of the asset."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

import world_vae as vae
from anyflow_train.tiny import shapes as world
from data_scaled_start import initialise

ASSET = Path(__file__).parents[2] / "assets" / "tiny-wan"
SHORT = vae.CodecSettings(
    joint=vae.Phase(steps=2, batch=1, learning_rate=1e-3),
    decoder=vae.Phase(steps=2, batch=1, learning_rate=1e-3),
    joint_frames=5,
    statistics_clips=2,
    judged_clips=2,
)


@pytest.fixture(scope="module")
def started() -> AutoencoderKLWan:
    """Initialised codec, before the first phase."""
    torch.manual_seed(0)
    codec = vae.build()
    initialise(codec, _crops())
    return codec.requires_grad_(False)


def _crops() -> torch.Tensor:
    return world.draw_clips(8, seed=1)[0][:, :, :5, :32, :32]


def test_the_start_carries_the_picture_and_is_nearly_noise_free(started: AutoencoderKLWan) -> None:
    posterior = started.encode(_crops(), return_dict=False)[0]
    # The first latent frame is what the scaling was measured on; later frames run through more convolutions.
    # Only the mean of all 32 channels' spreads is 1, so the 16 of the latents are near it.
    assert 0.5 < posterior.mean[:, :, :1].std() < 1.5
    assert posterior.logvar.mean() == pytest.approx(-6, abs=0.5)
    seen = vae.decode(started, posterior.mean)[:, :, 0]
    assert seen.std() == pytest.approx(0.4, abs=0.1)
    # diffusers' own start maps all clips to one picture: nothing is left of their differences.
    assert seen.std(0).mean() > 0.2


def test_the_rescaling_hooks_are_gone_and_left_consistent_weights(started: AutoencoderKLWan) -> None:
    assert not any(module._forward_hooks for module in started.modules())
    features = started.encoder.conv_in(_crops()[:, :, :1])
    # The first convolution saw exactly this input: every channel is centred, the whole has spread 1. (It is the mean
    # of the channels' spreads that is 1, in float32.)
    torch.testing.assert_close(features.mean((0, 2, 3, 4)), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std((0, 2, 3, 4)).mean(), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_moment_penalty_judges_each_frame_by_itself() -> None:
    latents = torch.randn(64, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    # 4096 values per channel and frame: sampling errors squared are about 1 / 4096.
    assert vae.moment_penalty(latents) < 2e-3
    latents[:, :, 0] *= 0.5
    latents[:, :, 1] *= 1.5
    # (1/2)^2 in each frame, though the spread over both frames together is near 1.
    assert vae.moment_penalty(latents) == pytest.approx(0.25, abs=0.02)
    assert vae.moment_penalty(latents + 2) == pytest.approx(4.25, abs=0.1)


def test_psnr_of_a_known_error() -> None:
    real = torch.zeros(2, 3, 1, 4, 4)
    assert vae.psnr(real + 0.02, real) == pytest.approx(40, abs=1e-3)  # 0.01 of the range of 2


def test_the_second_phase_leaves_the_latents_alone(started: AutoencoderKLWan) -> None:
    before = vae.encode(started, _crops())
    weight = started.decoder.conv_out.weight.clone()
    vae.write_statistics(started, replace(SHORT, statistics_clips=4))
    trained = vae.train_decoder(started, SHORT, lambda line: None)
    assert torch.equal(vae.encode(trained, _crops()), before)
    assert not torch.equal(trained.decoder.conv_out.weight, weight)


def test_the_shipped_codec_keeps_every_frame_and_every_class() -> None:
    codec = AutoencoderKLWan.from_pretrained(ASSET / "vae").float().eval()
    clips, labels = world.draw_clips(36, seed=4321)
    latents = vae.encode(codec, clips)
    seen = vae.decode(codec, latents)
    assert vae.accuracy(seen, labels) == 1.0
    assert vae.psnr(seen, clips) > 32
    assert vae.psnr(seen[:, :, :1], clips[:, :, :1]) > 33
    # One normalisation serves all frames: the first, which holds one picture and not four, is not the smaller one.
    mean, std = (torch.tensor(codec.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    spread = ((latents - mean) / std).std(dim=(0, 1, 3, 4))
    assert spread.min() > 0.8
    assert spread.max() < 1.2


def test_crops_of_shapes_count_the_foreground() -> None:
    settings = vae.CodecSettings()
    torch.manual_seed(0)
    video = vae.draw(16, 9, 32)
    assert video.shape == (16, 3, 9, 32, 32)
    weights = vae._pixel_weights(video, settings)
    # Background far from a shape counts 1, a shape at most 1 + 6 times as much, in every frame.
    for frame in weights.movedim(2, 0):
        assert 5 < frame.max() / frame.min() <= 7
    first, second = weights[:, :, 0], weights[:, :, 1]
    torch.testing.assert_close(first.min() / second.min(), torch.tensor(settings.first_frame_weight))
