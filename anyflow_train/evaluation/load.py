"""A trained or exported network by any of its names: run directory, checkpoint, exported folder, hub id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anyflow_train.config.chunks import Chunks
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from anyflow_train.evaluation.sampling import clip_sampler
from anyflow_train.files import EXPORT_MARKER
from anyflow_train.flow.causal import ClipSampler
from anyflow_train.flow.types import FlowMap
from anyflow_train.models.adapters import merge_lora
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.far_transformer import AnyFlowFARTransformer3DModel
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.models.source import locate
from anyflow_train.models.wan import load_network
from anyflow_train.training.checkpoints.reading import read_info, resolve_checkpoint
from anyflow_train.training.networks import load_trained_network


@dataclass(frozen=True)
class Model:
    """A network that is ready to sample from.

    Attributes:
        name: for labels and file names.
        network: LoRA merged, no gradients, in eval mode.
        step: of the checkpoint; None for an exported network.
        trained: config of the run; None for an exported network.
        marked: the run's config as `anyflow export` left it in the folder, places left out; empty where it did not.
    """

    name: str
    network: Backbone
    step: int | None
    trained: RunConfig | None
    marked: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chunks(self) -> Chunks | None:
        """Of a causal network."""
        config: Any = self.network.config
        if "chunk_partition" not in config:
            return None
        return Chunks(tuple(config.chunk_partition), config.full_chunk_limit)

    @property
    def sampler(self) -> ClipSampler:
        """How it is sampled."""
        marked = self.marked.get("objective", {}).get("kind")
        return clip_sampler(self.chunks, marked if self.trained is None else self.trained.objective.kind)

    @property
    def sees_conditioning_frames(self) -> bool:
        """Whether it can have learned to go on from frames; what nobody knows is taken to be so."""
        if self.chunks is not None:
            return True
        marked = self.marked.get("context", {}).get("i2v_probability", 1.0)
        return (marked if self.trained is None else self.trained.context.i2v_probability) > 0

    @property
    def codec_source(self) -> str | None:
        """The pipeline folder that the run was trained with; an exported folder holds its own codec."""
        return None if self.trained is None else self.trained.teacher.codec_source


def load_model(source: str, weights: str) -> Model:
    """Load a network on the CPU in float32.

    Args:
        source: run directory, checkpoint folder, folder that `anyflow export` or stock diffusers wrote, or hub id.
            A Wan transformer is taken as a flow map at gate 0, where any number of jumps are Euler steps.
        weights: `ema` or `raw`, of a checkpoint.

    Raises:
        UserError: there is nothing to load.
    """
    path = Path(source).expanduser()
    if (path / "checkpoints").is_dir() or (path / "state.json").is_file():
        checkpoint = resolve_checkpoint(path)
        network, trained = load_trained_network(checkpoint, weights)
        step = read_info(checkpoint).state.step
        return Model(trained.name, merge_lora(network).requires_grad_(False).eval(), step, trained)
    name = path.name if path.is_dir() else source.rsplit("/", 1)[-1]
    return Model(name, load_exported(source), None, None, _marked(path))


def _marked(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / EXPORT_MARKER).read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def load_exported(source: str) -> Backbone:
    """Load an AnyFlow or Wan transformer in diffusers' layout: folder or hub id.

    Raises:
        UserError: there is none.
    """
    path = Path(source).expanduser()
    place = path if path.exists() else source
    if locate(place)[1].get("_class_name") == AnyFlowFARTransformer3DModel.__name__:
        return load_network(place, causal={}).requires_grad_(False).eval()
    try:
        network = load_network(place, 0.0, "r")
    except UserError:  # an AnyFlow network has its own gate; gate 0 makes of a Wan network the flow map of its velocity
        network = load_network(place)
    return network.requires_grad_(False).eval()


def unique_names(models: list[Model]) -> list[str]:
    """Labels of several models: their names, with the step or a number where names repeat."""
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        names = [model.name if model.step is None else f"{model.name} @ {model.step}" for model in models]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, start=1)]


def on_device(network: Backbone, device: torch.device, dtype: torch.dtype | None) -> FlowMap:
    """The network's flow map on a device; `dtype` is that of autocast, None for float32."""
    nn.Module.to(network, device)  # diffusers' own `to` only adds checks of quantised networks
    return NetworkFlowMap(network, dtype)
