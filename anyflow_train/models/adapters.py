"""Low-rank adapters (LoRA, arXiv 2106.09685): attach to a network, name their parameters, merge, write as a file.

An adapted layer can hold the adapters of several roles, of which one is active: see `models.shared_base`. A network of
its own has one, which is always active.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from anyflow_train.config.network import Lora
from anyflow_train.errors import UserError
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.devices import on_device

AnyNetwork = TypeVar("AnyNetwork", bound=Backbone)
_ONLY = "adapter"


class Switch:
    """Which role is active. One plain attribute, not one per thread: a GPU's backward recomputes on another thread."""

    def __init__(self, active: str | None = None) -> None:
        self.active = active


class LowRank(nn.Module):
    """`scale * B A x`; the names are those of checkpoints."""

    def __init__(self, lora_A: nn.Linear, lora_B: nn.Linear, scale: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scale = lora_A, lora_B, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_B(self.lora_A(x)) * self.scale


class Adapted(nn.Module):
    """A module of the base and, for some roles, an addition to it or another module in its place."""

    def __init__(self, base: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.base, self.own, self._switch = base, nn.ModuleDict(), switch
        self.train(base.training)

    def give(self, role: str, module: nn.Module) -> None:
        """Add a role's own module."""
        self.own[role] = module

    def forward(self, *inputs: Any) -> Any:
        active = self._active()
        if isinstance(active, LowRank):
            result = self.base(*inputs)
            return (result + active(*inputs)).to(result.dtype)
        return active(*inputs)

    def __getattr__(self, name: str) -> Any:
        """Weights and parts of the active module: callers read the weights' dtypes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            active = self._active()
            module = self.base if isinstance(active, LowRank) else active
            if name in module._parameters or name in module._modules:  # nothing else: engines hang marks on modules
                return getattr(module, name)
            raise

    def _active(self) -> nn.Module:
        role = self._switch.active
        return self.own[role] if role is not None and role in self.own else self.base


def adapted(modules: Mapping[str, nn.Module], path: str, switch: Switch) -> Adapted:
    """The wrapper around one of a network's modules, which is put in its place if it is not there yet.

    Args:
        modules: of the network before anything was wrapped, by path.
    """
    parent, _, name = path.rpartition(".")
    children: Any = modules[parent]._modules
    if not isinstance(children[name], Adapted):
        children[name] = Adapted(modules[path], switch)
    return children[name]


def add_low_rank(modules: Mapping[str, nn.Module], settings: Lora, seed: int, role: str, switch: Switch) -> list[str]:
    """Give a role low-rank layers on all targets. They start at zero. Returns the targets' paths."""
    targets = [path for path in modules if is_target(path, settings)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path in targets:
            adapted(modules, path, switch).give(role, _low_rank(modules[path], settings))
    return targets


def add_lora(network: Backbone, settings: Lora, seed: int) -> None:
    """Freeze the network and give it adapters, in place. They start at zero: the network computes what it did before.

    Args:
        network: a network without adapters.
        settings: rank, alpha and targets (each the last part of names of linear layers), and modules to train whole.
        seed: of the random half of the adapters.

    Raises:
        UserError: a target or module that the network does not have, or that cannot be adapted.
    """
    modules = dict(network.named_modules())
    check_adapter(modules, settings, "student.adapter")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(is_in(name, settings.full_modules))
    add_low_rank(modules, settings, seed, _ONLY, Switch(_ONLY))


def trainable_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by the names that checkpoints use: without the wrappers' own names in them."""
    return {_plain(name): parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def merge_lora(network: AnyNetwork) -> AnyNetwork:
    """A copy of a network with its adapters added into its weights, and with exactly the keys of a plain network.

    The sums are float32, and rounded once to the dtype of the weight.
    """
    weights = {_plain(key): w.detach().clone() for key, w in network.state_dict().items() if ".lora_" not in key}
    for name, own in _adapters(network):
        weight, product = weights[f"{name}.weight"], _product(own)
        weights[f"{name}.weight"] = (weight.float() + product).to(weight.dtype)
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
    for name, own in _adapters(network):
        factors[f"transformer.{name}.lora_A.weight"] = own.lora_A.weight.detach().cpu().clone()
        factors[f"transformer.{name}.lora_B.weight"] = (own.lora_B.weight * own.scale).detach().cpu()
    if not factors:
        raise ValueError("the network has no LoRA adapters")
    return factors


def _adapters(network: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """Path of every adapted layer of a network of its own, and the adapter."""
    for name, module in network.named_modules():
        if isinstance(module, Adapted):
            own = module.own[_ONLY]
            assert isinstance(own, LowRank)
            yield name, own


def _low_rank(layer: Any, settings: Lora) -> LowRank:
    """A first factor of random numbers and a second of zeros, drawn as peft does."""
    first = nn.Linear(layer.in_features, settings.rank, bias=False)
    second = nn.Linear(settings.rank, layer.out_features, bias=False)
    nn.init.kaiming_uniform_(first.weight, a=5**0.5)
    nn.init.zeros_(second.weight)
    return on_device(LowRank(first, second, settings.alpha / settings.rank), layer.weight.device)


def _product(own: LowRank) -> Tensor:
    return (own.lora_B.weight.detach().float() @ own.lora_A.weight.detach().float()) * own.scale


def _plain(name: str) -> str:
    return name.replace(".base.", ".").replace(f".own.{_ONLY}.", ".")


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
