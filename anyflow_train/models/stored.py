"""A network on disk, read weight by weight: for starts in which no process may hold the whole of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from anyflow_train.errors import UserError
from anyflow_train.models.embeddings import resized_patch
from anyflow_train.models.source import describe_source, network_class
from anyflow_train.models.wan import DELTA, FAR, PATCH, TIME

_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class StoredNetwork:
    """What to build, and where its weights lie.

    Attributes:
        arguments: of the network's constructor, whose class `network_class` says.
        weights: model name -> (open file, name in it). Nothing has been read yet. What a causal network has beside
            those of a bidirectional one may be left out.
    """

    arguments: Mapping[str, Any]
    weights: Mapping[str, tuple[Any, str]]

    def read(self, name: str) -> Tensor:
        """One weight, float32, on the CPU."""
        if name not in self.weights and name.startswith(FAR):
            weight = self.read(name.replace(FAR, PATCH))
            return resized_patch(weight, self.arguments["compressed_patch_size"]) if weight.ndim > 1 else weight
        file, stored = self.weights[name]
        return file.get_tensor(stored).float()


def open_network(
    source: str | Path,
    gate_value: float | None = None,
    deltatime_type: str | None = None,
    causal: Mapping[str, Any] | None = None,
) -> StoredNetwork:
    """What `load_network` would load, with the same arguments, checks and errors."""
    place, arguments, kind = describe_source(source, gate_value, deltatime_type, causal)
    files = _open_files(source, place)
    with torch.device("meta"):
        network = network_class(arguments)(**arguments)
    is_wan = kind == WanTransformer3DModel.__name__
    weights, left = {}, set(files)
    for name, parameter in network.named_parameters():
        if name.startswith(FAR) and kind != type(network).__name__:
            continue  # made of the other patch embedding
        stored = name.replace(DELTA, TIME) if is_wan else name
        if stored not in files:
            raise UserError(str(source), f"lacks the weight {stored}")
        shape = tuple(files[stored].get_slice(stored).get_shape())
        if shape != tuple(parameter.shape):
            raise UserError(str(source), f"{stored} has shape {shape}, where its config says {tuple(parameter.shape)}")
        weights[name] = (files[stored], stored)
        left.discard(stored)
    if left:
        raise UserError(str(source), f"holds {min(left)}, for which the network has no place")
    return StoredNetwork(arguments, weights)


def _open_files(source: str | Path, place: str | None) -> dict[str, Any]:
    folder = Path(source) if Path(source).is_dir() else _download(str(source), place)
    folder = folder / (place or "")
    index = folder / f"{_FILE}.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {_FILE}
    try:
        files = [safe_open(folder / name, framework="pt") for name in sorted(names)]
    except OSError as error:
        raise UserError(str(source), f"its weights cannot be read: {error}") from error
    return {key: file for file in files for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


def _download(source: str, place: str | None) -> Path:
    prefix = f"{place}/" if place else ""
    return Path(snapshot_download(source, allow_patterns=[f"{prefix}*.safetensors", f"{prefix}*.json"]))
