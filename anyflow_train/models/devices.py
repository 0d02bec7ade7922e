"""Move modules between devices."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def on_device(module: AnyModule, device: torch.device) -> AnyModule:
    """Move a module to a device, unless it is there already: the fake weights of a dry run cannot be moved."""
    tensors = (*module.parameters(), *module.buffers())
    if any(tensor.device != device for tensor in tensors):
        nn.Module.to(module, device)  # diffusers' own `to` only adds checks of quantised networks
    return module
