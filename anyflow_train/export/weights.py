"""Writing a transformer in the files of stock diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_anyflow import AnyFlowTransformer3DModel as StockTransformer
from diffusers.models.transformers.transformer_anyflow_far import AnyFlowFARTransformer3DModel as StockFAR
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from anyflow_train.devices import DTYPES
from anyflow_train.errors import UserError
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.pretrained import DELTA, SHARED_CONFIG

Precision = Literal["fp32", "bf16", "fp16"]

# Stock diffusers computes these in float32 whatever dtype is asked for, so they are stored in float32. Its own list
# lacks `delta_embedder`, the twin of `time_embedder`: it is exact at least for those who load in float32.
KEPT_IN_FP32 = ("time_embedder", "delta_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
Config = Mapping[str, Any]
State = Mapping[str, Tensor]


def stock_class(config: Config) -> type[ModelMixin]:
    """Diffusers' class of our network with this config."""
    return StockFAR if "chunk_partition" in config else StockTransformer


def stored(state: State, precision: Precision) -> dict[str, Tensor]:
    """Weights in the dtype of their file, by name.

    Raises:
        UserError: a weight is not finite, or would not be in this precision.
    """
    cast = {name: tensor.detach().cpu().to(_dtype(name, precision)).contiguous() for name, tensor in state.items()}
    broken = [name for name, tensor in cast.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError("precision", f"'{broken[0]}' holds numbers that are not finite in {precision}")
    return cast


def write_network(network_class: type[ModelMixin], folder: Path, config: Config, state: State, shard: float) -> None:
    """Write stock diffusers' network with these weights; strict, every key accounted for.

    Args:
        network_class: diffusers' AnyFlowTransformer3DModel or WanTransformer3DModel.
        folder: to write `config.json` and the weights into.
        config: constructor arguments; what begins with an underscore is left out.
        state: as `stored` gives it.
        shard: largest file in GiB.
    """
    # On the meta device nothing is allocated and nothing is initialised: the weights are assigned, not copied.
    with torch.device("meta"):
        model = network_class(**{name: value for name, value in config.items() if not name.startswith("_")})
    model.load_state_dict(dict(state), strict=True, assign=True)
    model.save_pretrained(folder, max_shard_size=int(shard * 2**30), safe_serialization=True)


def to_wan(network: Backbone) -> WanTransformer3DModel:
    """The Wan2.1 transformer that a network without a second time is (a teacher trained by stage 0).

    The weights are shared with `network`.

    Raises:
        ValueError: the gate is not 0, so that the second time matters.
    """
    config: Any = network.config
    if config.gate_value != 0:
        raise ValueError(f"gate_value is {config.gate_value}: only a network with gate 0 is a Wan2.1 transformer")
    wan = WanTransformer3DModel(**{name: config[name] for name in SHARED_CONFIG}, image_dim=None)
    weights = {key: weight for key, weight in network.state_dict().items() if not key.startswith(DELTA)}
    wan.load_state_dict(weights, strict=True, assign=True)
    return wan


def _dtype(name: str, precision: Precision) -> torch.dtype:
    kept = any(part in name.split(".") for part in KEPT_IN_FP32)
    return torch.float32 if kept else DTYPES[precision]
