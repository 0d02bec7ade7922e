"""`anyflow prepare`: the command with the networks that can make clips from prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow_train.config.commands import PrepareConfig
from anyflow_train.config.derived import latent_shape
from anyflow_train.config.run import Data
from anyflow_train.data.prepare import command
from anyflow_train.data.prepare.videos import MakeLatents
from anyflow_train.data.shards import Sample
from anyflow_train.devices import autocast_dtype
from anyflow_train.evaluation.load import load_teacher, on_device
from anyflow_train.evaluation.sampling import Inputs, draw_noise, padded_condition, sample_all
from anyflow_train.flow.sampler import guided


def run(config: PrepareConfig) -> None:
    """Write shards. Raises UserError, KeyboardInterrupt or SystemExit, as `data.prepare.command.run` does."""
    command.run(config, teacher_latents)


def teacher_latents(config: PrepareConfig, device: torch.device, negative: Tensor) -> MakeLatents:
    """Load the teacher, and return the function that makes latents from texts.

    The noise of a sample depends on (seed, key) alone, so the result does not depend on processes and batches, apart
    from rounding.

    Raises:
        UserError: the teacher cannot be loaded.
    """
    teacher, length = load_teacher(config.teacher or ""), config.max_text_length
    data = Data(shards="", frames=config.frames, height=config.height, width=config.width)
    shape = latent_shape(data, teacher.network.config["in_channels"])
    flow_map = on_device(teacher.network, device, autocast_dtype(config.precision))
    flow_map = guided(flow_map, padded_condition([negative], length, device), config.guidance_scale)

    def make(samples: list[Sample]) -> Tensor:
        noise = [draw_noise(1, shape, config.seed, f"prepare {sample.key}") for sample in samples]
        texts = [sample.text for sample in samples]
        inputs = Inputs(torch.cat(noise), texts, length, len(samples), device)
        return sample_all(teacher.sampler, flow_map, inputs, config.steps, config.shift)

    return make
