"""Adapters as a LoRA file of diffusers: those that a run trained, or an approximation of a fully trained network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from anyflow_train.devices import DTYPES
from anyflow_train.errors import UserError
from anyflow_train.export.weights import Precision, stock_class
from anyflow_train.models.adapters import lora_state_dict
from anyflow_train.models.backbone import Backbone

FILE = "pytorch_lora_weights.safetensors"
OVERSAMPLING, ITERATIONS = 16, 4
"""Additional columns and power iterations of the randomised SVD: its error is then that of the exact one to 1e-3."""


def trained_factors(network: Backbone) -> dict[str, Tensor]:
    """Return the adapters that a run trained, including those of the second time embedder.

    Raises:
        UserError: the network has weights that a LoRA file cannot contain.
    """
    try:
        return lora_state_dict(network)
    except ValueError as error:
        raise UserError("format", f"lora is not possible: {error}; use format=pipeline or format=transformer") from None


def truncated_factors(network: Backbone, base: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """Approximate what a run changed by adapters: a truncated SVD of every linear layer's difference to the base.

    Biases, norms and other weights that an adapter cannot change keep the values of the base.

    Args:
        network: a network that was trained in full.
        base: weights that the run started from, by model name.
        rank: largest rank of an adapter.

    Returns:
        Factors under the names of a LoRA file, and the share of the change that they lose (root mean square).
    """
    factors: dict[str, Tensor] = {}
    changed, lost = 0.0, 0.0
    linear = {f"{path}.weight" for path, module in network.named_modules() if isinstance(module, nn.Linear)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, weight in network.state_dict().items():
            difference = weight.float() - base[name].float()
            size = float(difference.square().sum())
            changed, lost = changed + size, lost + size
            if name not in linear or size == 0:
                continue
            columns = min(rank + OVERSAMPLING, *difference.shape)
            u, s, v = torch.svd_lowrank(difference, q=columns, niter=ITERATIONS)
            kept = min(rank, *difference.shape)
            second, first = u[:, :kept] * s[:kept].sqrt(), (v[:, :kept] * s[:kept].sqrt()).T
            lost += float((difference - second @ first).square().sum()) - size
            path = f"transformer.{name.removesuffix('.weight')}"
            factors |= {f"{path}.lora_A.weight": first.contiguous(), f"{path}.lora_B.weight": second.contiguous()}
    if not factors:
        raise UserError("format", "lora is not possible: the run has not changed any linear layer of its base")
    return factors, (max(lost, 0.0) / changed) ** 0.5


def added(base: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add adapters to the weights of a base, by model name."""
    weights = dict(base)
    for name, second in factors.items():
        if name.endswith(".lora_B.weight"):
            weight = f"{name.removeprefix('transformer.').removesuffix('.lora_B.weight')}.weight"
            weights[weight] = weights[weight] + second @ factors[name.replace(".lora_B.", ".lora_A.")]
    return weights


def write_lora(folder: Path, factors: Mapping[str, Tensor], precision: Precision) -> None:
    """Write adapters as `pytorch_lora_weights.safetensors`."""
    stored = {name: factor.to(DTYPES[precision]).contiguous() for name, factor in factors.items()}
    save_file(stored, folder / FILE, metadata={"format": "pt"})


def reload_lora(folder: Path, base: Backbone) -> Any:
    """Load the adapters of a file into stock diffusers' network, on a base in float32."""
    stock: Any = stock_class(base.config).from_config(base.config)
    stock.load_state_dict(base.state_dict(), strict=True, assign=True)
    stock.load_lora_adapter(str(folder), weight_name=FILE)
    return stock.eval()
