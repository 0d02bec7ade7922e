"""Several roles on one frozen network. Each role has its own adapters and fully trained modules, and shares the rest.

Student, fake score and teacher then take the memory of one network plus adapters, instead of three networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.nn import Parameter

from anyflow_train.config.network import Lora, is_in
from anyflow_train.flow.types import FlowMap, FlowMapWithin
from anyflow_train.models.adapters import Switch, adapted, add_low_rank, check_adapter
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.build import Read, build_empty
from anyflow_train.models.devices import on_device


class SharedBase:
    """A network that computes with the adapters of the active role, or as the base if no role is active.

    A forward uses only the adapters of the active role, so training one role does not affect another.

    Args:
        network: network without adapters. It is frozen, and its layers are wrapped in place. Call it within `as_role`.
        read: reads weights of the base by model name; required if the network only holds shards of them, or
            rounded ones.

    Attributes:
        network: the wrapped network.
        compiled: set it to True if blocks are compiled together with their gradient checkpointing.
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
        """Roles that have adapters."""
        return tuple(self._roles)

    def add(self, role: str, settings: Lora, seed: int, where: str | None = None) -> None:
        """Add a role. Its adapters start at zero and its modules as copies, so it computes the same as the base.

        The initial parameters equal those of `add_lora` for the same network, settings and seed.

        Args:
            role: name of the role.
            settings: settings of its adapter.
            seed: seed of the first factors.
            where: config key of the settings for errors; None means `<role>.adapter`.

        Raises:
            UserError: the settings do not fit the network.
            ValueError: the role exists already.
        """
        if role in self._roles:
            raise ValueError(f"the role {role!r} exists already")
        check_adapter(self._plain, settings, where or f"{role}.adapter")
        wholes = _outermost(path for path in self._plain if is_in(f"{path}.", settings.full_modules))
        targets = add_low_rank(self._plain, settings, seed, role, self._switch)
        twin = build_empty(self.network.config) if wholes else None
        for path in wholes:
            adapted(self._plain, path, self._switch).own[role] = self._copied(twin, path)
        own = {*targets, *wholes}
        self._roles[role] = tuple(path for path in self._plain if path in own)

    def parameters(self, role: str) -> dict[str, Parameter]:
        """Parameters of a role, by the names of `trainable_parameters` for a network with this role only.

        Raises:
            ValueError: the role does not exist.
        """
        if role not in self._roles:
            raise ValueError(f"unknown role {role!r}; the roles are: {', '.join(self._roles) or 'none'}")
        found = {}
        for path in self._roles[role]:
            own = adapted(self._plain, path, self._switch).own[role]
            found |= {f"{path}.{name}": parameter for name, parameter in own.named_parameters()}
        return found

    def freeze(self, role: str) -> None:
        """Freeze the parameters of a role, for a teacher."""
        for parameter in self.parameters(role).values():
            parameter.requires_grad_(False)

    @contextmanager
    def as_role(self, role: str | None) -> Iterator[None]:
        """Activate a role within the context; None activates the base. Contexts can be nested.

        Gradient checkpointing recomputes a forward under the role it had, even if another role is active during the
        backward. Compiled blocks do not need this, because they recompute within their own graph.

        Raises:
            ValueError: the role does not exist.
        """
        if role is not None and role not in self._roles:
            raise ValueError(f"unknown role {role!r}; the roles are: {', '.join(self._roles) or 'none'}")
        # Done here, because enabling checkpointing sets a function that does not know the role.
        network: Any = self.network
        recompute = network._gradient_checkpointing_func
        if recompute != self._checkpointed and not self.compiled:
            self._recompute, network._gradient_checkpointing_func = recompute, self._checkpointed
        before, self._switch.active = self._switch.active, role
        try:
            yield
        finally:
            self._switch.active = before

    def flow_map(self, role: str | None, flow_map: FlowMap) -> FlowMapWithin:
        """Flow map of a role, from a flow map that calls the network (or an engine's wrapper of it)."""
        return FlowMapWithin(flow_map, partial(self.as_role, role))

    def _checkpointed(self, block: nn.Module, *inputs: Any) -> Any:
        role = self._switch.active

        def run(*given: Any) -> Any:
            with self.as_role(role):
                return block(*given)

        return self._recompute(run, *inputs)

    def _copied(self, twin: Any, path: str) -> nn.Module:
        """Copy a module with its weights. It is built from `twin`, because the base may only hold shards."""
        module: nn.Module = twin.get_submodule(path)
        device = next(self._plain[path].parameters()).device
        # Clone, because the weight may be mapped from a file that other roles read too.
        weights = {name: self._read(f"{path}.{name}").clone() for name, _ in module.named_parameters()}
        module.load_state_dict(weights, strict=True, assign=True)
        return on_device(module, device).requires_grad_(True).train(self._plain[path].training)


def _outermost(paths: Any) -> list[str]:
    """Remove paths that are inside another path."""
    found: list[str] = []
    for path in paths:  # a module comes before its children
        if not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    return found
