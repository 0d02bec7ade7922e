"""Low-rank adapters (LoRA, arXiv 2106.09685) on a network, through peft: attach, name, merge, write."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from anyflow_train.config.network import Lora
from anyflow_train.errors import UserError
from anyflow_train.models.backbone import Backbone

AnyNetwork = TypeVar("AnyNetwork", bound=Backbone)
_NAME = "default"


def add_lora(network: Backbone, settings: Lora, seed: int) -> None:
    """Freeze the network and give it adapters, in place. They start at zero: the network computes what it did before.

    Args:
        network: a network without adapters.
        settings: rank, alpha and targets (each the last part of names of linear layers), and modules to train whole.
        seed: of the random half of the adapters.

    Raises:
        UserError: a target or module that the network does not have, or that cannot be adapted.
    """
    check_adapter(dict(network.named_modules()), settings, "student.adapter")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType] # peft only divides it by the rank
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.add_adapter(config, _NAME)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".lora_" in name or is_in(name, settings.full_modules))


def trainable_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by the names that checkpoints use: without the adapter's own name in them."""
    return {_plain(name): parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def merge_lora(network: AnyNetwork) -> AnyNetwork:
    """A copy of a network with its adapters added into its weights, and with exactly the keys of a plain network.

    The sums are float32, and rounded once to the dtype of the weight.
    """
    weights = {_plain(key): w.detach().clone() for key, w in network.state_dict().items() if ".lora_" not in key}
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            weight = weights[f"{name}.weight"]
            weights[f"{name}.weight"] = (weight.float() + _product(module)).to(weight.dtype)
    with torch.device("meta"):
        merged = type(network).from_config(copy.deepcopy(dict(network.config)))
    merged.load_state_dict(weights, strict=True, assign=True)
    return merged.train(network.training)


def lora_state_dict(network: Backbone) -> dict[str, Tensor]:
    """The adapters under the names of a diffusers LoRA file, on the CPU: `AnyFlowPipeline.load_lora_weights` reads it.

    The second factors are multiplied by alpha / rank, so that a reader who knows nothing of alpha is right.

    Raises:
        ValueError: there are no adapters, or there are also modules trained whole, which such a file cannot hold.
    """
    whole = sorted(name for name in trainable_parameters(network) if ".lora_" not in name)
    if whole:
        raise ValueError(f"a LoRA file cannot hold the modules that were trained whole, such as {whole[0]}")
    factors: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            first, second = _factors(module)
            factors[f"transformer.{name}.lora_A.weight"] = first.detach().cpu().clone()
            factors[f"transformer.{name}.lora_B.weight"] = (second * module.scaling[_NAME]).detach().cpu()
    if not factors:
        raise ValueError("the network has no LoRA adapters")
    return factors


def _factors(module: LoraLayer) -> tuple[Tensor, Tensor]:
    first: Any = module.lora_A[_NAME]
    second: Any = module.lora_B[_NAME]
    return first.weight, second.weight


def _product(module: LoraLayer) -> Tensor:
    first, second = _factors(module)
    return (second.detach().float() @ first.detach().float()) * module.scaling[_NAME]


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(f".{_NAME}.", ".")


def is_in(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a parameter or module belongs to one of the modules, which are named by the end of their path."""
    return any(f".{module}." in f".{name}." for module in modules)


def is_target(path: str, settings: Lora) -> bool:
    """Whether a module is one that takes an adapter."""
    return any(f".{path}".endswith(f".{target}") for target in settings.targets)


def check_adapter(modules: Mapping[str, nn.Module], settings: Lora, where: str) -> None:
    """Compare settings with a network.

    Args:
        modules: of the network, by path.
        where: config key of the settings.

    Raises:
        UserError: a target or module that the network does not have, or that cannot be adapted.
    """
    for key, names in (("targets", settings.targets), ("full_modules", settings.full_modules)):
        for name in names:
            if not any(f".{path}".endswith(f".{name}") for path in modules):
                raise UserError(f"{where}.{key}", f"{name!r} names no module of the network")
    for path, module in modules.items():
        if not is_target(path, settings):
            continue
        if not isinstance(module, nn.Linear):
            raise UserError(f"{where}.targets", f"{path!r} is no linear layer; only those take an adapter")
        if is_in(path, settings.full_modules):
            raise UserError(f"{where}.full_modules", f"{path!r} is also a target; it can be only one of the two")
