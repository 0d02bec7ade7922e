"""Checks of an export: stock diffusers must compute the outputs of the trained model from the written files alone.

The outputs are compared at random inputs for several (t, r). Tolerances are relative root mean squares:

* Merging LoRA reorders float32 sums. The difference is 1e-6 in small networks and grows with width; 1e-4 is allowed.
* bf16 keeps 8 bits of a weight, an error of 2^-9 / sqrt(3) = 1.1e-3 each. Over tens of residual layers it grows to
  about 1e-2; 5e-2 is allowed. fp16 keeps 11 bits, so its error is an eighth; 1e-2 is allowed.

A missing adapter can change the outputs less than bf16 rounding does. So the merge is checked in float32 before weights
are rounded, and the written weights are compared with the rounded ones bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from anyflow_train.config.chunks import Chunks
from anyflow_train.errors import UserError, reason_of
from anyflow_train.export.weights import Precision
from anyflow_train.flow.causal import ClipSampler
from anyflow_train.flow.sampler import sample
from anyflow_train.flow.times import TIME_SCALE
from anyflow_train.flow.types import Condition
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.flow_map import NetworkFlowMap

MERGE_TOLERANCE = 1e-4
TOLERANCES: dict[Precision, float] = {"fp32": MERGE_TOLERANCE, "bf16": 5e-2, "fp16": 1e-2}
Pairs = tuple[tuple[float, float], ...]
TIMES: Pairs = ((1.0, 0.0), (1.0, 0.6), (0.8, 0.8), (0.5, 0.0), (0.2, 0.1))
"""Pairs (t, r) in [0, 1]: full and partial jumps, r = t, and a jump near the data."""
AT_ONCE: Pairs = tuple((t, t) for t, _ in TIMES)
"""The same times with r = t, where the average velocity is the velocity."""
TO_DATA: Pairs = tuple((t, 0.0) for t, _ in TIMES)
"""The same times with r = 0: whole jumps."""
SAMPLING_STEPS = 2


class WrongExport(RuntimeError):
    """The written files do not have the outputs of the trained model. This is a bug of the exporter."""


@dataclass(frozen=True)
class Probe:
    """Random inputs of a network, in diffusers' layout. The batch has one sample for each pair of `TIMES`.

    Attributes:
        latents: (B, F, C, H, W) float32.
        text: (B, L, D) float32.
        chunks: chunks of a causal network, enough to include each kind; None for other networks.
        noise: (1, F, C, H', W') float32, start of the samples.
    """

    latents: Tensor
    text: Tensor
    chunks: Chunks | None
    noise: Tensor

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Probe:
        """Draw small inputs that fit a network's config, with a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        patch, channels, batch = config["patch_size"][1], config["in_channels"], len(TIMES)
        chunks, frames, side = None, 3, 2 * patch
        height, width = side, side
        if "full_chunk_limit" in config:
            limit, side = config["full_chunk_limit"], 2 * config["compressed_patch_size"][1]
            chunks, frames = Chunks((1,) * (limit + 1), limit), limit + 1
            # Exactly 128 tokens: stock diffusers pads chunks to 128 tokens, and does not mask the padded keys.
            height, width = 8 * patch, 16 * patch
        latents = torch.randn(batch, frames, channels, side, side, generator=generator)
        text = torch.randn(batch, 16, config["text_dim"], generator=generator)
        noise = torch.randn(1, frames, channels, height, width, generator=generator)
        return cls(latents, text, chunks, noise)


@torch.inference_mode()
def flow_map_outputs(network: Callable[..., tuple[Tensor, ...]], probe: Probe, times: Pairs = TIMES) -> Tensor:
    """Compute average velocities at pairs (t, r), (B, F, C, H, W) float32."""
    frames = probe.latents.shape[1]
    t, r = (TIME_SCALE * column[:, None].expand(-1, frames) for column in torch.tensor(times).T)
    more: dict[str, Any] = {"return_dict": False}
    if probe.chunks is None:
        return network(probe.latents, t, r, probe.text, **more)[0].float()
    drawn = probe.chunks.sequence(len(probe.chunks.partition))
    given = torch.arange(frames) < drawn.context
    clean = probe.latents.flip(0)[:, drawn.context :]
    more |= {"clean_hidden_states": clean, "clean_timestep": torch.zeros(clean.shape[:2])}
    t, r = t.masked_fill(given, 0), r.masked_fill(given, 0)
    return network(probe.latents, t, r, probe.text, list(drawn.chunks), **more)[0].float()


@torch.inference_mode()
def wan_outputs(network: WanTransformer3DModel, probe: Probe) -> Tensor:
    """Compute velocities of a Wan transformer at all of `TIMES`, (B, F, C, H, W) float32."""
    times = TIME_SCALE * torch.tensor([t for t, _ in TIMES])
    hidden = probe.latents.permute(0, 2, 1, 3, 4)
    output = network(hidden, times, probe.text, return_dict=False)[0]
    return output.permute(0, 2, 1, 3, 4)


@torch.inference_mode()
def two_jumps(network: Backbone, probe: Probe, shift: float) -> Tensor:
    """Sample the probe's noise in two steps with this package's sampler. Returns (1, F, C, H', W')."""
    condition = Condition(probe.text[:1])
    sampler = ClipSampler(sample, probe.chunks)
    return sampler(NetworkFlowMap(network, None), probe.noise, condition, SAMPLING_STEPS, shift)


def check_weights(written: ModelMixin, expected: Mapping[str, Tensor]) -> None:
    """Compare a reloaded network with the expected tensors.

    Raises:
        WrongExport: names or bits differ.
    """
    found = written.state_dict()
    if found.keys() != expected.keys():
        different = sorted(found.keys() ^ expected.keys())
        raise WrongExport(
            f"{len(different)} keys differ between the written files and the model, first '{different[0]}'"
        )
    for name, tensor in expected.items():
        if not torch.equal(found[name], tensor.to(found[name].dtype)):
            raise WrongExport(f"'{name}' differs between the written files and the model")


def check_outputs(what: str, found: Tensor, expected: Tensor, tolerance: float) -> float:
    """Compare outputs. Returns their relative difference.

    Raises:
        WrongExport: the difference is above the tolerance, or not a number.
    """
    difference = float((found.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    if not difference <= tolerance:
        raise WrongExport(f"{what} differs from the trained model by {difference:.2e}, but {tolerance:.0e} is allowed")
    return difference


def check_pipeline(folder: Path, probe: Probe, expected: Tensor, shift: float, tolerance: float) -> float:
    """Load the whole folder as a user does, sample two steps, compare with `two_jumps`, and play one clip.

    Returns:
        Relative difference of the outputs.

    Raises:
        UserError: the folder cannot be loaded, or its codec does not make clips.
        WrongExport: the shift or the outputs are wrong.
    """
    pipeline = load_pipeline(folder)
    if pipeline.scheduler.config.shift != shift:
        raise WrongExport(f"the scheduler's shift is {pipeline.scheduler.config.shift}, not {shift}")
    latents = probe.noise.permute(0, 2, 1, 3, 4)
    size = _clip_size(pipeline, probe)
    embeds = probe.text[:1]
    sampled = pipeline(
        prompt_embeds=embeds, latents=latents, output_type="latent", num_inference_steps=SAMPLING_STEPS, **size
    )[0]
    play_clip(pipeline, probe)
    return check_outputs("sampling", sampled.permute(0, 2, 1, 3, 4), expected, tolerance)


def load_pipeline(folder: Path) -> Any:
    """Load all parts of an exported pipeline. The text encoder is loaded in bfloat16, because it can be large.

    Raises:
        UserError: a part cannot be loaded.
    """
    dtypes = {"default": torch.bfloat16, "transformer": torch.float32, "vae": torch.float32}
    try:
        pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=dtypes)
    except Exception as error:  # the parts that were copied can be wrong in any way
        found = f"{type(error).__name__}: {reason_of(error)}"
        problem = f"its text encoder, tokenizer or VAE cannot be loaded by diffusers ({found})"
        raise UserError("codec", f"{problem}; name an intact Wan2.1 pipeline") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def play_clip(pipeline: Any, probe: Probe) -> None:
    """Make a clip from a prompt, as a user does.

    Raises:
        UserError: the clip has another size, or numbers that are not finite. The transformer has been checked before.
    """
    size = _clip_size(pipeline, probe)
    video = pipeline("a clip", num_inference_steps=1, guidance_scale=1.0, output_type="pt", **size)[0]
    wanted = (1, size["num_frames"], 3, size["height"], size["width"])
    if tuple(video.shape) != wanted or not torch.isfinite(video).all():
        problem = f"with this codec, the export makes a clip of shape {tuple(video.shape)} that is not finite or not"
        raise UserError("codec", f"{problem} {wanted}; name an intact Wan2.1 pipeline")


def _clip_size(pipeline: Any, probe: Probe) -> dict[str, Any]:
    """Arguments for clips of the probe's size."""
    _, frames, _, height, width = probe.noise.shape
    vae = pipeline.vae.config
    space, time = vae.scale_factor_spatial, vae.scale_factor_temporal
    size = {"height": space * height, "width": space * width, "num_frames": time * (frames - 1) + 1}
    chunks = {} if probe.chunks is None else {"chunk_partition": list(probe.chunks.partition)}
    return {**size, **chunks, "return_dict": False}
