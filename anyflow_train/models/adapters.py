"""Low-rank adapters (LoRA, arXiv 2106.09685): attach to a network, name their parameters, merge, write as a file.

An adapted layer can hold the adapters of several roles, one of which is active at a time (see `models.shared_base`). In
a network that is not shared, each layer has one adapter, which is always active.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from anyflow_train.config.network import Lora, is_in, is_target
from anyflow_train.errors import UserError
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.build import build_empty
from anyflow_train.models.devices import on_device
from anyflow_train.models.kernels import transformed

AnyNetwork = TypeVar("AnyNetwork", bound=Backbone)
_ONLY = "adapter"


class Switch:
    """Holds the active role. It is not thread-local, because a backward on a GPU recomputes on another thread."""

    def __init__(self, active: str | None = None) -> None:
        self.active = active


class PassingLinear(nn.Linear):
    """A linear layer without bias that also hands on its input, to the layer that it adapts.

    The gradient of that layer's input is then increased in one matrix product, and not by a product and a sum.
    """

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """(N, in_features) -> (N, out_features), and the input in the dtype of the product."""
        if transformed() or not (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input), input
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        return _ProductAndInput.apply(input.to(dtype), self.weight.to(dtype))


class _ProductAndInput(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return x @ weight.t(), x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_x: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        # `grad_x` is the result of a product in the backward pass of the adapted layer, and nothing else reads it.
        return grad_x.addmm_(grad, weight), grad.t() @ x


class AddedLinear(nn.Linear):
    """A linear layer without bias that adds its product to a tensor, in one matrix product.

    It reads its own weight, because ZeRO-3 only gathers the weights of the module that is called.
    """

    def forward(self, input: Tensor, onto: Tensor, scale: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compute `onto + scale * W input`, if possible in the memory of `onto`.

        input: (N, in_features); onto: (N, out_features), the result of a matrix product that nothing else reads.
        Returns the dtype of `onto`.
        """
        factors = input.to(onto.dtype), self.weight.to(onto.dtype).t()
        # Engines hand on views of outputs, which autograd does not let change; compilers choose for themselves.
        if transformed() or (torch.is_grad_enabled() and onto._is_view()):
            return torch.addmm(onto, *factors, alpha=scale)
        return onto.addmm_(*factors, alpha=scale)


class LowRank(nn.Module):
    """A low-rank layer, `scale * B A x`. The attribute names appear in checkpoints."""

    def __init__(self, lora_A: PassingLinear, lora_B: AddedLinear, scale: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scale = lora_A, lora_B, scale

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Compute `base(x) + scale * B A x` for x (N, in_features); see `AddedLinear.forward`."""
        low, x = self.lora_A(x)
        return self.lora_B(low, base(x), self.scale)


class Adapted(nn.Module):
    """A module of the base. Each role can add a low-rank layer to it, or replace it by its own module.

    Attributes:
        base: the module.
        own: role -> its low-rank layer or its own module.
    """

    def __init__(self, base: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.base, self.own, self._switch = base, nn.ModuleDict(), switch
        self.train(base.training)

    def forward(self, *inputs: Any) -> Any:
        active = self._active()
        if isinstance(active, LowRank):
            (x,) = inputs
            return active(x.flatten(0, -2), self.base).unflatten(0, x.shape[:-1])
        return active(*inputs)

    def __getattr__(self, name: str) -> Any:
        """Forward access to weights and parts to the active module, because callers read the weights' dtypes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            active = self._active()
            module = self.base if isinstance(active, LowRank) else active
            if name in module._parameters or name in module._modules:  # only these: engines set attributes
                return getattr(module, name)
            raise

    def _active(self) -> nn.Module:
        role = self._switch.active
        return self.own[role] if role is not None and role in self.own else self.base


def adapted(modules: Mapping[str, nn.Module], path: str, switch: Switch) -> Adapted:
    """Return the wrapper around a module of the network. Wrap the module if it is not wrapped yet.

    Args:
        modules: path -> module of the network, from before any module was wrapped.
        path: path of the module.
        switch: holds the active role.
    """
    parent, _, name = path.rpartition(".")
    children: Any = modules[parent]._modules
    if not isinstance(children[name], Adapted):
        children[name] = Adapted(modules[path], switch)
    return children[name]


def add_low_rank(modules: Mapping[str, nn.Module], settings: Lora, seed: int, role: str, switch: Switch) -> list[str]:
    """Add low-rank layers of a role to all targets. They start at zero. Returns the paths of the targets."""
    targets = [path for path in modules if is_target(path, settings.targets)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path in targets:
            adapted(modules, path, switch).own[role] = _low_rank(modules[path], settings)
    return targets


def add_lora(network: Backbone, settings: Lora, seed: int) -> None:
    """Freeze the network and add adapters, in place. The adapters start at zero, so the output does not change.

    Args:
        network: a network without adapters.
        settings: rank, alpha, targets (suffixes of the names of linear layers), and modules that are fully trained.
        seed: seed of the first factors; the second factors are zero.

    Raises:
        UserError: the network lacks a target or module, or a target is not a linear layer.
    """
    modules = dict(network.named_modules())
    check_adapter(modules, settings, "student.adapter")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(is_in(name, settings.full_modules))
    add_low_rank(modules, settings, seed, _ONLY, Switch(_ONLY))


def trainable_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by their names in checkpoints, which omit the names of the wrappers."""
    return {_plain(name): parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def merge_lora(network: AnyNetwork) -> AnyNetwork:
    """Copy a network with its adapters merged into the weights. The copy has the keys of a plain network.

    The sum is computed in float32 and rounded once, to the dtype of the weight.
    """
    weights = {_plain(key): w.detach().clone() for key, w in network.state_dict().items() if ".lora_" not in key}
    for name, own in _adapters(network):
        weight = weights[f"{name}.weight"]
        product = (own.lora_B.weight.detach().float() @ own.lora_A.weight.detach().float()) * own.scale
        weights[f"{name}.weight"] = (weight.float() + product).to(weight.dtype)
    merged: AnyNetwork = build_empty(network.config)
    merged.load_state_dict(weights, strict=True, assign=True)
    return merged.train(network.training)


def lora_state_dict(network: Backbone) -> dict[str, Tensor]:
    """Adapters under the names of a diffusers LoRA file, on the CPU. `AnyFlowPipeline.load_lora_weights` reads it.

    The second factors are multiplied by alpha / rank, because the file does not contain alpha.

    Raises:
        ValueError: the network has no adapters, or has fully trained modules, which a LoRA file cannot hold.
    """
    whole = sorted(name for name in trainable_parameters(network) if ".lora_" not in name)
    if whole:
        raise ValueError(f"a LoRA file cannot hold fully trained modules, such as {whole[0]}")
    factors: dict[str, Tensor] = {}
    for name, own in _adapters(network):
        factors[f"transformer.{name}.lora_A.weight"] = own.lora_A.weight.detach().cpu().clone()
        factors[f"transformer.{name}.lora_B.weight"] = (own.lora_B.weight * own.scale).detach().cpu()
    if not factors:
        raise ValueError("the network has no LoRA adapters")
    return factors


def _adapters(network: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """Path and adapter of every adapted layer of a network that is not shared."""
    for name, module in network.named_modules():
        if isinstance(module, Adapted):
            own = module.own[_ONLY]
            assert isinstance(own, LowRank)
            yield name, own


def _low_rank(layer: Any, settings: Lora) -> LowRank:
    """Create a low-rank layer initialised as in peft: random first factor, zero second factor."""
    first = PassingLinear(layer.in_features, settings.rank, bias=False)
    second = AddedLinear(settings.rank, layer.out_features, bias=False)
    nn.init.kaiming_uniform_(first.weight, a=5**0.5)
    nn.init.zeros_(second.weight)
    return on_device(LowRank(first, second, settings.alpha / settings.rank), layer.weight.device)


def _plain(name: str) -> str:
    return name.replace(".base.", ".").replace(f".own.{_ONLY}.", ".")


def check_adapter(modules: Mapping[str, nn.Module], settings: Lora, where: str) -> None:
    """Check that the settings fit the network.

    Args:
        modules: path -> module of the network.
        settings: settings of the adapter.
        where: config key of the settings.

    Raises:
        UserError: the network lacks a target or module, or a target is not a linear layer.
    """
    for key, names in (("targets", settings.targets), ("full_modules", settings.full_modules)):
        for name in names:
            if not any(is_target(path, (name,)) for path in modules):
                raise UserError(f"{where}.{key}", f"the network has no module {name!r}")
    for path in (path for path in modules if is_target(path, settings.targets)):
        if not isinstance(modules[path], nn.Linear):
            raise UserError(f"{where}.targets", f"{path!r} is not a linear layer, and cannot have an adapter")
        if is_in(f"{path}.", settings.full_modules):
            raise UserError(f"{where}.full_modules", f"{path!r} is also a target; remove it from one of the two")
