"""Writing a transformer as files of stock diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.transformers.transformer_anyflow import AnyFlowTransformer3DModel as StockTransformer
from diffusers.models.transformers.transformer_anyflow_far import AnyFlowFARTransformer3DModel as StockFAR
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from anyflow_train.devices import DTYPES
from anyflow_train.errors import UserError
from anyflow_train.models.backbone import KEPT_IN_FP32, Backbone
from anyflow_train.models.pretrained import DELTA, SHARED_CONFIG

Precision = Literal["fp32", "bf16", "fp16"]

Config = Mapping[str, Any]
State = Mapping[str, Tensor]
Stock = type[StockTransformer] | type[StockFAR] | type[WanTransformer3DModel]


def stock_class(config: Config) -> Stock:
    """Return diffusers' class for a network with this config."""
    return StockFAR if "chunk_partition" in config else StockTransformer


def stored(state: State, precision: Precision) -> dict[str, Tensor]:
    """Convert weights to the dtype of the file.

    Raises:
        UserError: a weight is not finite in this precision.
    """
    cast = {name: tensor.detach().cpu().to(_dtype(name, precision)).contiguous() for name, tensor in state.items()}
    broken = [name for name, tensor in cast.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError("precision", f"'{broken[0]}' has numbers that are not finite in {precision}; use fp32")
    return cast


def write_network(network_class: Stock, folder: Path, config: Config, state: State, shard: float) -> None:
    """Write stock diffusers' network with these weights. Missing and unexpected keys are errors.

    Args:
        network_class: diffusers' AnyFlowTransformer3DModel or WanTransformer3DModel.
        folder: folder for `config.json` and the weights.
        config: constructor arguments, as in the network's `config`.
        state: weights from `stored`.
        shard: largest file in GiB.
    """
    # The meta device allocates and initialises nothing. The weights are assigned, not copied.
    with torch.device("meta"):
        model: Any = network_class.from_config(dict(config))
    model.load_state_dict(dict(state), strict=True, assign=True)
    model.save_pretrained(folder, max_shard_size=int(shard * 2**30), safe_serialization=True)


def to_wan(network: Backbone) -> WanTransformer3DModel:
    """Convert a network without a second time (a teacher of stage 0) to a Wan2.1 transformer with the same weights.

    Raises:
        ValueError: the gate is not 0, or the network takes images.
    """
    config: Any = network.config
    if config.gate_value != 0:
        raise ValueError(f"gate_value is {config.gate_value}: only a network with gate 0 is a Wan2.1 transformer")
    wan = WanTransformer3DModel(**{name: config[name] for name in SHARED_CONFIG}, image_dim=None)
    weights = {key: weight for key, weight in network.state_dict().items() if not key.startswith(DELTA)}
    wan.load_state_dict(weights, strict=True, assign=True)
    return wan


def _dtype(name: str, precision: Precision) -> torch.dtype:
    # Stock diffusers computes these in float32. Its own list lacks `delta_embedder`: storing it in float32 keeps it
    # exact at least when the network is loaded in float32.
    kept = any(part in name.split(".") for part in KEPT_IN_FP32)
    return torch.float32 if kept else DTYPES[precision]
