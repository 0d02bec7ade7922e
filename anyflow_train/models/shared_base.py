"""Several roles on one frozen network: each has low-rank adapters and whole modules of its own, and borrows the rest.

Student, fake score and teacher then take the memory of one network and their adapters, not of three networks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from anyflow_train.config.network import Lora
from anyflow_train.flow.types import CausalFlowMap, Condition, FlowMap
from anyflow_train.models.adapters import Switch, adapted, add_low_rank, check_adapter, is_in
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.build import Read
from anyflow_train.models.devices import on_device


class SharedBase:
    """One network that is a different one for every role, and the bare base for none.

    Nothing but the active role's adapters takes part in a forward, so no role's gradient or training reaches another.
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
        self._switch = Switch()
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
        wholes = _outermost(path for path in self._plain if is_in(path, settings.full_modules))
        targets = add_low_rank(self._plain, settings, seed, role, self._switch)
        twin = self._twin() if wholes else None
        for path in wholes:
            adapted(self._plain, path, self._switch).give(role, self._copied(twin, path))
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
            own = adapted(self._plain, path, self._switch).own[role]
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


def _outermost(paths: Any) -> list[str]:
    """Paths without those that lie inside of another."""
    found: list[str] = []
    for path in paths:  # a module comes before what it holds
        if not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    return found
