"""Measures the memory and operations of validation during a run, on fake tensors."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode

from anyflow_train.config.chunks import Chunks
from anyflow_train.config.derived import latent_shape
from anyflow_train.config.pipelines import VAE
from anyflow_train.config.run import RunConfig
from anyflow_train.evaluation.sampling import EULER, clip_sampler
from anyflow_train.evaluation.teacher_reference import reference_scale
from anyflow_train.files import read_object
from anyflow_train.flow.sampler import guided
from anyflow_train.flow.types import Condition
from anyflow_train.models.codec import Codec
from anyflow_train.plan.meter import Meter, Moment
from anyflow_train.training.recipe import Recipe

SAMPLING, DECODING = "validation, sampling", "validation, decoding"
STUDENT, TEACHER = "student", "teacher"


def sample_once(config: RunConfig, recipe: Recipe, meter: Meter) -> dict[str, float]:
    """Sample a batch of validation in one step; further steps need no more memory.

    Returns:
        Operations of one call for one sample, of the student and, if it is the reference, of the teacher.
    """
    evaluation = config.evaluation
    rows = min(evaluation.batch, max(evaluation.videos, compared_samples(config))) if evaluation.every else 0
    if not rows:
        return {}
    architecture = config.student.architecture
    length = max(config.data.text_lengths)
    with torch.no_grad(), meter.part(SAMPLING):
        negative = Condition(torch.empty(1, length, architecture.text_dim))
        text = Condition(torch.empty(rows, length, architecture.text_dim))
        noise = torch.empty(rows, *latent_shape(config.data, architecture.in_channels))
        sampler = clip_sampler(Chunks.of(architecture), config.objective.any_step)
        sampled = {STUDENT: (sampler, guided(recipe.averaged, negative, evaluation.guidance_scale))}
        if evaluation.reference == "teacher" and recipe.roles.teacher is not None:
            sampled[TEACHER] = EULER, guided(recipe.roles.teacher, negative, reference_scale(config))
        calls = {}
        for role, (sample, flow_map) in sampled.items():
            before = meter.operations.total()
            sample(flow_map, noise, text, 1, evaluation.shift)
            calls[role] = (meter.operations.total() - before) / rows
    return calls


def compared_samples(config: RunConfig) -> int:
    """Number of samples that a validation compares with clips or with the teacher."""
    evaluation = config.evaluation
    return evaluation.samples if evaluation.held_out or evaluation.reference == "teacher" else 0


def decodes(config: RunConfig) -> bool:
    """Whether the run has a VAE, to decode what validation samples."""
    evaluation = config.evaluation
    looks = evaluation.reference == "teacher" and evaluation.reference_videos > 0
    return bool(evaluation.every) and (evaluation.videos > 0 or evaluation.oracle != "none" or looks)


def decoder_memory(config: RunConfig) -> Moment:
    """Find the fullest moment of decoding, with the VAE's weights, which are on the GPU only then.

    A decoder goes from latent frame to latent frame, so the memory of longer clips follows from two short ones.
    """
    rows = config.evaluation.batch if config.evaluation.oracle != "none" else 1
    frames, channels, height, width = latent_shape(config.data, config.student.architecture.in_channels)
    source = config.teacher.codec_source
    (weights, few), (_, more) = (_decoded(source, (rows, count, channels, height, width)) for count in (3, 4))
    return Moment(weights + more + max(frames - 4, 0) * (more - few), 0, 0, 0, False)


@cache
def _decoded(source: str | None, shape: tuple[int, ...]) -> tuple[int, int]:
    """Bytes of the VAE's weights, and of everything else at the fullest moment of decoding latents of this shape."""
    with FakeTensorMode(), Meter() as meter:
        stored = read_object(Path(source).expanduser() / VAE) if source else {}
        vae: Any = AutoencoderKLWan.from_config(stored)  # the VAE of Wan2.1 if the source is not here
        vae.eval().requires_grad_(False)
        codec = Codec("dry run", vae, torch.device("cpu"), torch.float32)
        weights = sum(tensor.nbytes for tensor in (*vae.parameters(), *vae.buffers()))
        meter.settle()
        with meter.part(DECODING):
            codec.decode_video(torch.empty(shape))
    return weights, max(moment.activations for moment in meter.moments.values())
