"""Adapters by peft, as an independent implementation."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from anyflow_train.config.network import Lora
from anyflow_train.models.backbone import Backbone


def add_peft(network: Backbone, settings: Lora, seed: int) -> None:
    """Add adapters as `add_lora` does, with peft."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType] # peft only divides it by the rank
        target_modules=list(settings.targets),
    )
    torch.manual_seed(seed)
    network.add_adapter(config, "default")
    for name, parameter in network.named_parameters():
        whole = any(f".{module}." in f".{name}." for module in settings.full_modules)
        parameter.requires_grad_(".lora_" in name or whole)


def peft_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters under our names."""
    return {_plain(name): parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def peft_merged(network: nn.Module) -> dict[str, Tensor]:
    """Merged weights, under the names of a network without adapters."""
    weights = {_plain(name): weight.clone() for name, weight in network.state_dict().items() if ".lora_" not in name}
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            weights[f"{name}.weight"] += layer.get_delta_weight("default")
    return weights


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(".default.", ".")
