"""Several roles on one frozen network: each has low-rank adapters and whole modules of its own, and borrows the rest.

Student, fake score and teacher then take the memory of one network and their adapters, not of three networks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from anyflow_train.config.network import Lora
from anyflow_train.flow.types import CausalFlowMap, Condition, FlowMap
from anyflow_train.models.adapters import check_adapter, is_in, is_target
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.devices import on_device

Read = Callable[[str], Tensor]


class SharedBase:
    """One network that is a different one for every role, and the bare base for none.

    Nothing but the active role's adapters takes part in a forward, so no role's gradient or training reaches another.
    peft could hold the adapters too, but each change of the active one would walk over all layers and change what
    requires a gradient, and it cannot copy whole modules that are in shards.

    Args:
        network: without adapters; it is frozen, and its layers are wrapped in place. Call it within `as_role`.
        read: gives the base's weights by model name, where the network holds only shards of them.

    Attributes:
        compiled: set it where blocks are compiled together with their checkpointing.
    """

    def __init__(self, network: Backbone, read: Read | None = None) -> None:
        self.network = network.requires_grad_(False)
        self._plain = dict(network.named_modules())
        weights = dict(network.named_parameters())
        self._read: Read = read or (lambda name: weights[name].detach())
        self._switch = _Switch()
        self.compiled = False
        self._roles: dict[str, tuple[str, ...]] = {}

    @property
    def roles(self) -> tuple[str, ...]:
        """Who has adapters."""
        return tuple(self._roles)

    def add(self, role: str, settings: Lora, seed: int, where: str | None = None) -> None:
        """Give a role adapters that start at zero, and copies of its whole modules: it computes what the base does.

        Its parameters start as those that `add_lora` would make of the same network, settings and seed.

        Args:
            where: config key of the settings, for errors; None: `<role>.adapter`.

        Raises:
            UserError: the settings do not fit the network. ValueError: the role has adapters already.
        """
        if role in self._roles:
            raise ValueError(f"the role {role!r} is there already")
        check_adapter(self._plain, settings, where or f"{role}.adapter")
        targets = [path for path in self._plain if is_target(path, settings)]
        wholes = _outermost(path for path in self._plain if is_in(path, settings.full_modules))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for path in targets:
                self._shared(path).give(role, _low_rank(self._plain[path], settings))
        twin = self._twin() if wholes else None
        for path in wholes:
            self._shared(path).give(role, self._copied(twin, path))
        own = {*targets, *wholes}
        self._roles[role] = tuple(path for path in self._plain if path in own)

    def parameters(self, role: str) -> dict[str, Parameter]:
        """A role's parameters, by the names that `trainable_parameters` gives those of a network with this role only.

        Raises:
            ValueError: there is no such role.
        """
        if role not in self._roles:
            raise ValueError(f"there is no role {role!r}; there are {', '.join(self._roles) or 'none'}")
        found = {}
        for path in self._roles[role]:
            own = self._shared(path).own[role]
            found |= {f"{path}.{name}": parameter for name, parameter in own.named_parameters()}
        return found

    def freeze(self, role: str) -> None:
        """The role's parameters are only read from now on: for a teacher."""
        for parameter in self.parameters(role).values():
            parameter.requires_grad_(False)

    @contextmanager
    def as_role(self, role: str | None) -> Iterator[None]:
        """Inside, the network is this role's; None: the bare base. May be nested; what was active comes back.

        A forward is remembered with its role: gradient checkpointing recomputes it under that, whatever is active
        during the backward. A compiled one needs no reminder, since it recomputes within its own graph.

        Raises:
            ValueError: there is no such role.
        """
        if role is not None and role not in self._roles:
            raise ValueError(f"there is no role {role!r}; there are {', '.join(self._roles) or 'none'}")
        # Here, because who enables checkpointing puts a function there that forgets the role.
        network: Any = self.network
        recompute = network._gradient_checkpointing_func
        if recompute != self._checkpointed and not self.compiled:
            self._recompute, network._gradient_checkpointing_func = recompute, self._checkpointed
        before, self._switch.active = self._switch.active, role
        try:
            yield
        finally:
            self._switch.active = before

    def flow_map(self, role: str | None, flow_map: FlowMap) -> RoleFlowMap:
        """A role's flow map, from one that calls the network (or an engine's wrapper of it)."""
        return RoleFlowMap(self, role, flow_map)

    def _checkpointed(self, block: nn.Module, *inputs: Any) -> Any:
        role = self._switch.active

        def run(*given: Any) -> Any:
            with self.as_role(role):
                return block(*given)

        return self._recompute(run, *inputs)

    def _shared(self, path: str) -> _Shared:
        """The wrapper in a module's place, which is put there first if need be."""
        parent, _, name = path.rpartition(".")
        children = self._plain[parent]._modules
        if not isinstance(children[name], _Shared):
            children[name] = _Shared(self._plain[path], self._switch)
        return children[name]  # pyright: ignore[reportReturnType]

    def _twin(self) -> nn.Module:
        """A network of the same shape, without weights."""
        with torch.device("meta"):
            return type(self.network).from_config(copy.deepcopy(dict(self.network.config)))

    def _copied(self, twin: Any, path: str) -> nn.Module:
        """A module with the base's weights. From a twin, because the base may hold only shards."""
        module: nn.Module = twin.get_submodule(path)
        device = next(self._plain[path].parameters()).device
        # What is read may lie in a file that other roles read too: each needs memory of its own.
        weights = {name: self._read(f"{path}.{name}").clone() for name, _ in module.named_parameters()}
        module.load_state_dict(weights, strict=True, assign=True)
        return on_device(module, device).requires_grad_(True).train(self._plain[path].training)


@dataclass(frozen=True)
class RoleFlowMap:
    """A flow map that is called as a role.

    Attributes:
        shared: of whose network it is.
        role: None: the bare base.
        flow_map: calls that network.
    """

    shared: SharedBase
    role: str | None
    flow_map: FlowMap

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        with self.shared.as_role(self.role):
            return self.flow_map(x, t, r, condition)

    def encode_context(self, x: Tensor, chunks: tuple[int, ...], condition: Condition) -> object:
        with self.shared.as_role(self.role):
            return cast(CausalFlowMap, self.flow_map).encode_context(x, chunks, condition)


class _Switch:
    """Which role is active. One plain attribute, not one per thread: a GPU's backward recomputes on another thread."""

    active: str | None = None


class _LowRank(nn.Module):
    """`scale * B A x`; the names are those of checkpoints."""

    def __init__(self, lora_A: nn.Linear, lora_B: nn.Linear, scale: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scale = lora_A, lora_B, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_B(self.lora_A(x)) * self.scale


class _Shared(nn.Module):
    """A module of the base and, for some roles, an addition to it or another in its place."""

    def __init__(self, base: nn.Module, switch: _Switch) -> None:
        super().__init__()
        self.base, self.own, self._switch = base, nn.ModuleDict(), switch
        self.train(base.training)

    def give(self, role: str, module: nn.Module) -> None:
        self.own[role] = module

    def forward(self, *inputs: Any) -> Any:
        active = self._active()
        if isinstance(active, _LowRank):
            result = self.base(*inputs)
            return (result + active(*inputs)).to(result.dtype)
        return active(*inputs)

    def __getattr__(self, name: str) -> Any:
        """Weights and parts too are those of the module that computes, for who asks for their dtype."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            active = self._active()
            module = self.base if isinstance(active, _LowRank) else active
            if name in module._parameters or name in module._modules:  # nothing else: engines hang marks on modules
                return getattr(module, name)
            raise

    def _active(self) -> nn.Module:
        role = self._switch.active
        return self.own[role] if role is not None and role in self.own else self.base


def _low_rank(layer: Any, settings: Lora) -> _LowRank:
    """A first factor of random numbers and a second of zeros, drawn as peft does."""
    first = nn.Linear(layer.in_features, settings.rank, bias=False)
    second = nn.Linear(settings.rank, layer.out_features, bias=False)
    nn.init.kaiming_uniform_(first.weight, a=5**0.5)
    nn.init.zeros_(second.weight)
    return on_device(_LowRank(first, second, settings.alpha / settings.rank), layer.weight.device)


def _outermost(paths: Any) -> list[str]:
    """Paths without those that lie inside of another."""
    found: list[str] = []
    for path in paths:  # a module comes before what it holds
        if not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    return found
