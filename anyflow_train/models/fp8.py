"""Frozen linear layers that multiply in 8 bits: float8 e4m3 (3 bits of mantissa), with a scale for every row.

A row of the input is a token and a row of the weight an output, so neither batch nor neighbours change what a token
gets. No weight gradient is taken, and nothing but the weight is kept for the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import ScalingType, linear, scaled_mm

from anyflow_train.errors import UserError
from anyflow_train.models.backbone import Backbone

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
SMALLEST_SCALE = 1e-12  # of a row of zeros, which has nothing to be divided by
# Of sizes that a GPU's kernels take.
MULTIPLE = 16


class Fp8Linear(nn.Module):
    """A frozen linear layer that multiplies in fp8 wherever autocast has others multiply in bfloat16.

    Without autocast, and in float16, it is the plain layer: so the difference forwards keep their own precision.
    Its parameters are those of the layer that it replaces, under their names.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features); bfloat16 where it multiplies in fp8."""
        if not in_bfloat16(x):
            return linear(x, self.weight, self.bias)
        return _with_bias(_Product.apply(x.flatten(0, -2), self.weight), self.bias, x)


class StoredFp8Linear(nn.Module):
    """A linear layer of a network that is only ever called without gradient: its weight takes a byte per number.

    Always multiplies in fp8, and gives bfloat16.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        values, scales = rows_in_fp8(layer.weight.detach())
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scales = nn.Buffer(scales)
        self.bias = layer.bias
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return _with_bias(_product(x.flatten(0, -2), self.weight, self.scales), self.bias, x)


def multiply_in_fp8(network: Backbone) -> None:
    """Let the frozen linear layers of the blocks multiply in fp8, in place. Adapters and what is trained stay.

    Raises:
        UserError: a layer has a size that is no multiple of 16.
    """
    for parent, name, layer in list(_frozen_layers(network)):
        parent._modules[name] = Fp8Linear(layer)


def store_in_fp8(network: Backbone) -> None:
    """Keep the linear layers of the blocks of a frozen network in fp8 only, in place.

    Raises:
        UserError: a layer has a size that is no multiple of 16.
    """
    for parent, name, layer in list(_frozen_layers(network)):
        parent._modules[name] = StoredFp8Linear(layer)


def rows_in_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> e4m3 of the same shape and float32 scales (N, 1): x is about their product, within 1/16 of itself.

    Numbers below 2^-15 of the largest in their row lose more: there e4m3 has steps of 2^-18 of it.
    """
    scales = (x.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp_min(SMALLEST_SCALE)
    return (x / scales).to(E4M3), scales


def in_bfloat16(x: Tensor) -> bool:
    """Whether autocast has products with x taken in bfloat16."""
    device = x.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16


class _Product(torch.autograd.Function):
    """`x w^T` in fp8; its gradient by x is taken in the gradient's own precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """x: (N, K), weight: (M, K) -> (N, M) bfloat16."""
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        return _product(x, *rows_in_fp8(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        return (gradient @ weight.to(gradient.dtype)).to(ctx.dtype), None


def _product(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """(N, K) of any dtype by an e4m3 (M, K) with scales (M, 1) -> (N, M) bfloat16."""
    values, rows = rows_in_fp8(x)
    by_row = ScalingType.RowWise
    return scaled_mm(values, weight.t(), rows, by_row, scales.t(), by_row, output_dtype=torch.bfloat16)


def _with_bias(product: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    product = product.unflatten(0, x.shape[:-1])
    return product if bias is None else product + bias.to(product.dtype)


def _frozen_layers(network: Backbone) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Parent, name and layer; not what belongs to an adapter, trained or not."""
    for path, parent in network.blocks.named_modules():
        for name, layer in parent.named_children():
            if not isinstance(layer, nn.Linear) or layer.weight.requires_grad or ".lora_" in f".{path}.{name}":
                continue
            if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
                size = f"{layer.in_features} x {layer.out_features}"
                problem = f"needs layers of multiples of {MULTIPLE} numbers, but blocks.{path}.{name} is {size}"
                raise UserError("engine.fp8", f"{problem}; set it to none")
            yield parent, name, layer
