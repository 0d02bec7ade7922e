"""Frozen linear layers that multiply in float8 e4m3 (3 bits of mantissa), with one scale per row.

A row of the input is a token and a row of the weight is an output. The result of a token therefore does not depend on
other tokens. The weight has no gradient, and only the weight is saved for the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from anyflow_train.config.rules.precision import MULTIPLE
from anyflow_train.errors import UserError
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.frozen import frozen_linear

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
SMALLEST_SCALE = 1e-12  # avoids a division by zero for a row of zeros


class Fp8Linear(nn.Module):
    """A frozen linear layer that multiplies in fp8 under bfloat16 autocast.

    Without autocast, or in float16, it computes as the plain layer, so the forwards of the time derivative keep their
    precision. Names and values of the parameters are those of the layer that it replaces.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in_features) -> (..., out_features); bfloat16 if it multiplies in fp8."""
        if not in_bfloat16(x):
            return frozen_linear(x, self.weight, self.bias)
        return _with_bias(_Product.apply(x.flatten(0, -2), self.weight), self.bias, x)


class StoredFp8Linear(Fp8Linear):
    """A linear layer whose weight is stored in fp8, one byte per number. For networks that never need a gradient.

    It always multiplies in fp8 and returns bfloat16.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        values, scales = rows_in_fp8(layer.weight.detach())
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scales = nn.Buffer(scales)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in_features) -> (..., out_features) bfloat16."""
        return _with_bias(_product(x.flatten(0, -2), self.weight, self.scales), self.bias, x)


def multiply_in_fp8(network: Backbone) -> None:
    """Let the frozen linear layers of the blocks multiply in fp8, in place. Adapters and trainable layers are kept.

    Raises:
        UserError: the size of a layer is not a multiple of 16.
    """
    for parent, name, layer in list(_frozen_layers(network)):
        parent._modules[name] = Fp8Linear(layer)


def store_in_fp8(network: Backbone) -> None:
    """Store the linear layers of the blocks of a frozen network in fp8, in place.

    Raises:
        UserError: the size of a layer is not a multiple of 16.
    """
    for parent, name, layer in list(_frozen_layers(network)):
        parent._modules[name] = StoredFp8Linear(layer)


def rows_in_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Convert x (N, K) to e4m3 values (N, K) and float32 scales (N, 1), whose product is x with an error up to 1/16.

    Numbers below 2^-15 of the largest in their row have larger relative errors, because there the step of e4m3 is 2^-18
    of the largest.
    """
    scales = (x.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp_min(SMALLEST_SCALE)
    return (x / scales).to(E4M3), scales


def in_bfloat16(x: Tensor) -> bool:
    """Whether autocast computes matrix products with x in bfloat16."""
    device = x.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16


class _Product(torch.autograd.Function):
    """Computes `x w^T` in fp8. The gradient with respect to x is computed in the dtype of the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply: x (N, K), weight (M, K) -> (N, M) bfloat16."""
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        return _product(x, *rows_in_fp8(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        return (gradient @ weight.to(gradient.dtype)).to(ctx.dtype), None


def _product(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Multiply x (N, K) of any dtype by an e4m3 weight (M, K) with scales (M, 1) -> (N, M) bfloat16."""
    values, rows = rows_in_fp8(x)
    # The operator of torch.nn.functional.scaled_mm: torch.compile of torch 2.11 cannot capture that function.
    multiply, by_row, plain = torch.ops.aten._scaled_mm_v2, [ScalingType.RowWise.value], [0]
    arguments = (values, weight.t(), [rows], by_row, plain, [scales.t()], by_row, plain, None, torch.bfloat16)
    return multiply(*arguments, use_fast_accum=True)


def _with_bias(product: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    product = product.unflatten(0, x.shape[:-1])
    return product if bias is None else product + bias.to(product.dtype)


def _frozen_layers(network: Backbone) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield parent, name and layer of each frozen linear layer that does not belong to an adapter."""
    for path, parent in network.blocks.named_modules():
        for name, layer in parent.named_children():
            if not isinstance(layer, nn.Linear) or layer.weight.requires_grad or ".lora_" in f".{path}.{name}":
                continue
            if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
                size = f"{layer.in_features} x {layer.out_features}"
                problem = f"needs layer sizes that are multiples of {MULTIPLE}, but blocks.{path}.{name} is {size}"
                raise UserError("engine.fp8", f"{problem}; set engine.fp8=none")
            yield parent, name, layer
