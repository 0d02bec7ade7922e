"""Loading networks for sampling from a run directory, checkpoint, exported folder, Wan2.1 folder or hub id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anyflow_train.config.chunks import Chunks
from anyflow_train.config.network import STUDENT_TIMES
from anyflow_train.evaluation.sampling import clip_sampler
from anyflow_train.files import EXPORT_MARKER, read_json
from anyflow_train.flow.causal import ClipSampler
from anyflow_train.flow.types import FlowMap
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.build import assemble
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.models.pretrained import TEACHER_TIMES
from anyflow_train.training.checkpoints.network_file import Sampling
from anyflow_train.training.checkpoints.reading import read_network, read_step, resolve_checkpoint
from anyflow_train.training.checkpoints.state import is_run
from anyflow_train.training.weight_source import open_source


@dataclass(frozen=True)
class LoadedNetwork:
    """A network that is ready to be sampled, on the CPU in float32.

    Attributes:
        name: name for labels and files.
        network: the network in eval mode, with LoRA merged and without gradients.
        sampling: facts of the training that sampling needs.
        codec_source: pipeline folder or hub id of the VAE and text encoder.
        step: step of the checkpoint; None if the network does not come from a checkpoint.
    """

    name: str
    network: Backbone
    sampling: Sampling
    codec_source: str
    step: int | None = None

    @property
    def chunks(self) -> Chunks | None:
        """Chunks of a causal network, otherwise None."""
        config: Any = self.network.config
        if "chunk_partition" not in config:
            return None
        return Chunks(tuple(config.chunk_partition), config.full_chunk_limit)

    @property
    def flow_map(self) -> FlowMap:
        """Network as a function `(x, t, r, condition) -> u` of times in [0, 1]."""
        return NetworkFlowMap(self.network, None)

    @property
    def sampler(self) -> ClipSampler:
        """Sampler of clips: `sampler(flow_map, noise, condition, steps, shift)`, (B, F, C, H, W) -> the same shape."""
        return clip_sampler(self.chunks, self.sampling.any_step)

    @property
    def sees_conditioning_frames(self) -> bool:
        """Whether the network can have learned to use conditioning frames; True if that is not known."""
        return self.chunks is not None or self.sampling.conditioning_frames


def load_student(source: str | Path, weights: str = "ema") -> LoadedNetwork:
    """Load a student. A Wan2.1 transformer becomes an untrained student with gate 0.25.

    Args:
        source: run directory, checkpoint folder, folder that `anyflow export` wrote, Wan2.1 folder, or hub id.
        weights: `ema` or `raw` weights of a run.

    Raises:
        UserError: there is no such network, or it cannot be loaded.
    """
    return _load(str(source), weights, STUDENT_TIMES)


def load_teacher(source: str | Path, weights: str = "ema") -> LoadedNetwork:
    """Load a network as a teacher, which is sampled in Euler steps with its velocity at `r = t`.

    Args:
        source: as in `load_student`. A Wan2.1 transformer keeps its outputs (gate 0).
        weights: `ema` or `raw` weights of a run.

    Raises:
        UserError: there is no such network, or it cannot be loaded.
    """
    loaded = _load(str(source), weights, TEACHER_TIMES)
    return replace(loaded, sampling=loaded.sampling.model_copy(update={"any_step": False}))


def load_model(source: str, weights: str) -> LoadedNetwork:
    """Load a network that a command names. A Wan2.1 transformer keeps its outputs and is sampled in Euler steps.

    Raises:
        UserError: there is no such network, or it cannot be loaded.
    """
    return _load(source, weights, TEACHER_TIMES)


def _load(source: str, weights: str, wan_times: Mapping[str, Any]) -> LoadedNetwork:
    found = resolve_checkpoint(source) if is_run(source) else source
    opened = open_source(found, weights, wan_times).merged()
    network = assemble(opened.arguments, opened.read).requires_grad_(False).eval()
    if isinstance(found, Path):
        trained = read_network(found)
        return LoadedNetwork(trained.run, network, trained.sampling, trained.codec or source, read_step(found))
    path = Path(source).expanduser()
    name = path.name if path.is_dir() else source.rsplit("/", 1)[-1]
    return LoadedNetwork(name, network, _sampling_of_export(path), source)


def _sampling_of_export(folder: Path) -> Sampling:
    """Read the facts that `anyflow export` wrote into its folder; other folders get the defaults."""
    try:
        marker = read_json(folder / EXPORT_MARKER)
        return Sampling.model_validate(marker["sampling"]) if "sampling" in marker else Sampling.of(marker["config"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Sampling()


def unique_names(models: list[LoadedNetwork]) -> list[str]:
    """Make unique labels of models: their names, with the step or a number if names repeat."""
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        names = [model.name if model.step is None else f"{model.name} @ {model.step}" for model in models]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, start=1)]


def on_device(network: Backbone, device: torch.device, dtype: torch.dtype | None) -> FlowMap:
    """Move a network to a device and return its flow map. `dtype` is the dtype of autocast; None for float32."""
    nn.Module.to(network, device)  # diffusers' own `to` only adds checks of quantised networks
    return NetworkFlowMap(network, dtype)
