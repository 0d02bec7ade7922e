"""Train the tiny causal video autoencoder of the moving shapes, an `AutoencoderKLWan` of 668 thousand parameters.

There are two phases. The first one trains encoder and decoder together on short, small crops. This is cheap, and
enough to learn the causal recurrence over frames. The second one trains the decoder alone on frozen latents, half of
the time on whole clips, for picture quality. Three measures make the latents easy for a small diffusion model:

* A penalty pulls each channel to mean 0 and standard deviation 1 *in each latent frame separately*. The pipeline
  normalises a channel with one mean and one deviation for all frames. But the first latent frame contains one picture
  and the others four, and without the penalty its deviation is 0.6 of the others'. Equal errors of a diffusion model
  would then matter most in the first frame.
* Noise on the latents lets neighbouring latents decode alike, and sampled latents decode cleanly.
* The first frame counts several times, because the decoder has no earlier frame to use for it.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

from anyflow_train.tiny import shapes
from data_scaled_start import initialise


@dataclass(frozen=True)
class Phase:
    """Settings of one phase: AdamW with a short warm-up and a cosine decay to 2 %, and EMA of the weights."""

    steps: int
    batch: int
    learning_rate: float


@dataclass(frozen=True)
class CodecSettings:
    """Hyper-parameters of the codec; the defaults make `assets/tiny-wan`.

    Attributes:
        early_share: part of the joint steps with the squared error alone.
        foreground_weight: how much more pixels on a shape or near its edge count than the background. Shapes cover 7 %
            of their picture: with equal weights the codec stays at the background for hundreds of steps.
    """

    seed: int = 0
    early_share: float = 0.5
    foreground_weight: float = 6.0
    joint: Phase = Phase(steps=600, batch=6, learning_rate=3e-3)
    decoder: Phase = Phase(steps=450, batch=4, learning_rate=3e-3)
    crop: int = 32  # pixels, the side of the small crops of both phases
    joint_frames: int = 9  # with 5 frames the recurrence would have only one step
    latent_noise: float = 0.1  # in standard deviations of a channel
    kl_weight: float = 1e-4
    moment_weight: float = 0.05
    first_frame_weight: float = 3.0
    statistics_clips: int = 256  # clips that latents_mean and latents_std are taken over
    flow_shift: float = 5.0  # shift of the pipeline's scheduler
    report_every: int = 50  # steps
    judged_clips: int = 12  # held-out clips that each progress line is measured on


def build() -> AutoencoderKLWan:
    """Build the untrained codec: 16 latent channels, factor 8 in space and 4 in time."""
    return AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def train_vae(settings: CodecSettings, report: Callable[[str], None] = print) -> AutoencoderKLWan:
    """Train the codec, and write `latents_mean` and `latents_std` into its config.

    The random draws depend on `settings.seed` alone, and the caller's generator does not change. `report` is called
    with each line of progress.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        codec = build()
        initialise(codec, draw(8, settings.joint_frames, settings.crop))
        codec = train_jointly(codec, settings, report)
        write_statistics(codec, settings)
        codec = train_decoder(codec, settings, report)
    return codec.eval().requires_grad_(False)


def train_jointly(codec: AutoencoderKLWan, settings: CodecSettings, report: Callable[[str], None]) -> AutoencoderKLWan:
    """Train encoder and decoder on crops. Returns the moving average."""

    def loss(step: int) -> Tensor:
        video = draw(settings.joint.batch, settings.joint_frames, settings.crop)
        posterior = codec.encode(video, return_dict=False)[0]
        noise = settings.latent_noise * torch.randn_like(posterior.mean)
        seen = codec.decode(posterior.sample() + noise, return_dict=False)[0]
        # The squared error learns the mean colour first and edges later. The absolute error then sharpens the picture.
        early = step < settings.early_share * settings.joint.steps
        fit = 4 * _squared(seen, video, settings) if early else _sharp(seen, video, settings)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return fit + settings.kl_weight * kl + settings.moment_weight * moment_penalty(posterior.mean)

    return _optimise(codec, codec.parameters(), settings.joint, settings, loss, "joint", report)


def train_decoder(codec: AutoencoderKLWan, settings: CodecSettings, report: Callable[[str], None]) -> AutoencoderKLWan:
    """Train the decoder on latents of the frozen encoder, from crops and whole clips. Returns the moving average."""
    codec.requires_grad_(False)
    trained = [*codec.decoder.parameters(), *codec.post_quant_conv.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    spread = torch.tensor(codec.config["latents_std"]).view(1, -1, 1, 1, 1)

    def loss(step: int) -> Tensor:
        whole = step % 2 == 1 and step > 0.3 * settings.decoder.steps
        count = max(1, settings.decoder.batch // 2) if whole else settings.decoder.batch
        video = draw(count, shapes.FRAMES, shapes.SIZE if whole else settings.crop)
        with torch.no_grad():
            latents = codec.encode(video, return_dict=False)[0].mode()
            latents = latents + settings.latent_noise * spread * torch.randn_like(latents)
        return _sharp(codec.decode(latents, return_dict=False)[0], video, settings)

    return _optimise(codec, trained, settings.decoder, settings, loss, "decoder", report)


def moment_penalty(latents: Tensor) -> Tensor:
    """Penalise deviations of each channel from mean 0 and deviation 1 per latent frame: (B, C, F, H, W) -> scalar."""
    over = (0, 3, 4)
    return (latents.mean(over).square() + (latents.std(over) - 1).square()).mean()


@torch.no_grad()
def write_statistics(codec: AutoencoderKLWan, settings: CodecSettings) -> None:
    """Write the mean and standard deviation per channel, over encoded clips, into the codec's config."""
    latents = encode(codec, shapes.draw_clips(settings.statistics_clips, seed=11)[0])
    over = (0, 2, 3, 4)
    codec.register_to_config(latents_mean=latents.mean(over).tolist(), latents_std=latents.std(over).tolist())


@torch.no_grad()
def encode(codec: AutoencoderKLWan, video: Tensor, batch: int = 16) -> Tensor:
    """Compute posterior modes, not normalised: (B, 3, F, H, W) in [-1, 1] -> (B, 16, (F - 1) / 4 + 1, H / 8, W / 8)."""
    return torch.cat([codec.encode(part, return_dict=False)[0].mode() for part in video.split(batch)])


@torch.no_grad()
def decode(codec: AutoencoderKLWan, latents: Tensor, batch: int = 16) -> Tensor:
    """Decode latents of `encode` to videos in [-1, 1]."""
    return torch.cat([codec.decode(part, return_dict=False)[0] for part in latents.split(batch)])


def psnr(seen: Tensor, real: Tensor) -> float:
    """Compute the mean peak signal-to-noise ratio in dB of videos (B, 3, F, H, W) in [-1, 1]."""
    error = ((seen - real) / 2).square().flatten(1).mean(1)
    return (-10 * torch.log10(error)).mean().item()


def accuracy(video: Tensor, labels: Tensor) -> float:
    """Compute the share of videos (B, 3, F, H, W) whose recognised class is `labels` (B,)."""
    return (shapes.recognise(video).labels == labels).float().mean().item()


def judge(codec: AutoencoderKLWan, video: Tensor, labels: Tensor) -> str:
    """Format a line of progress: quality of clips and first frames, accuracy, latent deviation of the first frame."""
    latents = encode(codec, video)
    seen = decode(codec, latents)
    spread, right = latents.std(dim=(0, 1, 3, 4)), accuracy(seen, labels)
    return (
        f"psnr {psnr(seen, video):.2f} first frame {psnr(seen[:, :, :1], video[:, :, :1]):.2f} "
        f"accuracy {right:.3f} latent spread {spread[0]:.2f} then {spread[1:].mean():.2f}"
    )


def draw(count: int, frames: int, size: int) -> Tensor:
    """Draw clips from torch's global generator, as crops of a wider world.

    Shapes may be cut by the border of a crop, or come in from outside of it.
    """
    labels = torch.randint(0, shapes.CLASSES, (count,))
    contrast = shapes.LEAST_CONTRAST + (1 - shapes.LEAST_CONTRAST) * torch.rand(count)
    place = torch.rand(count, 2)
    if size == shapes.SIZE:
        return shapes.render(labels, place, contrast, frames, size)
    middle = place * (size + 16) - 8
    return shapes.render_from(labels, start_of(labels, middle, frames), contrast, frames, size)


def start_of(labels: Tensor, middle: Tensor, frames: int) -> Tensor:
    """Where shapes start (B, 2) so that they are at the pixel `middle` (B, 2) halfway through `frames` frames."""
    return middle - shapes.motion_of(labels) * shapes.SPEED * (frames - 1) / 2


def _weights(frames: int, settings: CodecSettings) -> Tensor:
    """Return weights (F, 1, 1) of mean 1; the first frame counts `first_frame_weight` times."""
    weights = torch.ones(frames)
    weights[0] = settings.first_frame_weight
    return (weights / weights.mean())[:, None, None]


def _pixel_weights(real: Tensor, settings: CodecSettings) -> Tensor:
    """Weights that broadcast over (B, 3, F, H, W): of the frames, and of the foreground."""
    weights = _weights(real.shape[2], settings)
    background = 2 * torch.tensor(shapes.BACKGROUND)[:, None, None, None] - 1
    foreground = ((real - background).abs().amax(1, keepdim=True) / 1.2).clamp(0, 1)
    near = nn.functional.max_pool3d(foreground, (1, 7, 7), 1, (0, 3, 3))
    counted = 1 + settings.foreground_weight * near
    return weights * counted / counted.mean()


def _squared(seen: Tensor, real: Tensor, settings: CodecSettings) -> Tensor:
    return ((seen - real).square() * _pixel_weights(real, settings)).mean()


def _sharp(seen: Tensor, real: Tensor, settings: CodecSettings) -> Tensor:
    absolute = ((seen - real).abs() * _pixel_weights(real, settings)).mean()
    return absolute + _squared(seen, real, settings)


def _optimise(
    codec: AutoencoderKLWan,
    parameters: Iterable[nn.Parameter],
    phase: Phase,
    settings: CodecSettings,
    loss_at: Callable[[int], Tensor],
    name: str,
    report: Callable[[str], None],
) -> AutoencoderKLWan:
    """Run one phase on `codec` in place. Returns the moving average of its weights."""
    parameters = list(parameters)
    average = copy.deepcopy(codec).requires_grad_(False)
    held_out, labels = shapes.draw_clips(settings.judged_clips, seed=999)
    optimizer = torch.optim.AdamW(parameters, lr=phase.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    started = time.perf_counter()
    for step in range(phase.steps):
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * _schedule(step, phase.steps)
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.98, (step + 1) / (step + 11))  # the average follows quickly at first
        with torch.no_grad():
            for kept, new in zip(average.parameters(), codec.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        if (step + 1) % settings.report_every == 0 or step + 1 == phase.steps:
            seconds = time.perf_counter() - started
            line = judge(average, held_out, labels)
            report(f"{name} {step + 1}/{phase.steps} {seconds:.0f} s loss {loss.item():.4f} {line}")
    return average


def _schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate: warm-up over 30 steps times a cosine from 1 to 0.02."""
    return min(1.0, (step + 1) / 30) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
