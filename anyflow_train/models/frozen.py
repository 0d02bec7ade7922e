"""Frozen linear layers that are stored in bfloat16, half the memory of float32.

Under bfloat16 autocast they compute exactly what float32 layers compute, because autocast rounds those at every call.
Norms, modulation, patch embeddings and the embedders of times stay in float32, as autocast keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import linear

from anyflow_train.config.network import is_in
from anyflow_train.models.backbone import Backbone

# `ConditionEmbedder` computes them without autocast.
_WIDE = ("time_embedder", "delta_embedder", "time_proj")


class HalfLinear(nn.Linear):
    """A frozen linear layer in bfloat16, without values: read them into it.

    Args:
        layer: the layer that it replaces. Names and shapes of the parameters are equal.
    """

    def __init__(self, layer: nn.Linear) -> None:
        device = layer.weight.device
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device)
        # Converted here, because DeepSpeed creates all tensors of a network in float32, whatever dtype is asked for.
        for name, parameter in list(self.named_parameters()):
            self.register_parameter(name, Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False))
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: (..., in_features) -> (..., out_features)."""
        return frozen_linear(input, self.weight, self.bias)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer whose dtype may differ from that of x. Without autocast, it computes in the dtype of x."""
    if not torch.is_autocast_enabled(x.device.type):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return linear(x, weight, bias)


def store_in_bfloat16(network: Backbone, trained: Sequence[str] = ()) -> Backbone:
    """Replace the linear layers of an empty network by layers in bfloat16, in place. Returns the network.

    Args:
        network: network without values, or whose values will be read again.
        trained: names of modules that are trained, and stay in float32.
    """
    for path, parent in list(network.named_modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and not is_in(f"{path}.{name}.", (*_WIDE, *trained)):
                parent._modules[name] = HalfLinear(layer)
    return network
