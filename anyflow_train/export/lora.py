"""Adapters as a LoRA file of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from anyflow_train.devices import DTYPES
from anyflow_train.errors import UserError
from anyflow_train.export.weights import Precision, stock_class
from anyflow_train.models.adapters import lora_state_dict
from anyflow_train.models.backbone import Backbone

FILE = "pytorch_lora_weights.safetensors"


def write_lora(folder: Path, network: Backbone, precision: Precision) -> None:
    """Write the adapters, including those of the second time embedder, as `pytorch_lora_weights.safetensors`.

    Raises:
        UserError: the network has no adapters, or weights that a LoRA file cannot contain.
    """
    try:
        factors = lora_state_dict(network)
    except ValueError as error:
        raise UserError("format", f"lora is not possible: {error}; use format=pipeline or format=transformer") from None
    stored = {name: factor.to(DTYPES[precision]).contiguous() for name, factor in factors.items()}
    save_file(stored, folder / FILE, metadata={"format": "pt"})


def reload_lora(folder: Path, base: Backbone) -> Any:
    """Load the adapters of a file into stock diffusers' network, on a base in float32."""
    stock: Any = stock_class(base.config).from_config(base.config)
    stock.load_state_dict(base.state_dict(), strict=True, assign=True)
    stock.load_lora_adapter(str(folder), weight_name=FILE)
    return stock.eval()
