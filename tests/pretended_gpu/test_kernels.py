"""Fused Triton kernels, by Triton's interpreter on CPU tensors: values and gradients are those of the formulas."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_train.models import fused
from anyflow_train.models.fused_gpu import AddGated, ModulatedLayerNorm, RotatedRMSNorm
from anyflow_train.models.rotary import rotation_table

pytestmark = pytest.mark.pretended_gpu

BATCH, TOKENS, EPS = 2, 70, 1e-6
HEADS, HEAD_DIM = 3, 14
WIDTH = HEADS * HEAD_DIM  # no power of two; a frame has more rows than a program, and no multiple of them
MODULATIONS = {"one row": (1, 1), "a row per sample": (BATCH, 1), "a row per frame": (1, 2), "of each": (BATCH, 2)}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter must be chosen before the kernels are imported."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "run these tests as CONTRIBUTING.md says"
    # Only numbers: an interpreted kernel has no warps.
    monkeypatch.setattr("anyflow_train.models.fused_gpu._WARPS", 1)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def modulation(rows: tuple[int, int]) -> tuple[Tensor, ...]:
    """Six rows in one tensor, of which each is a view, as in a block."""
    return drawn(*rows, 6, WIDTH, seed=9).chunk(6, dim=2)


def compare(ours: Any, plain: Any, tensors: list[Tensor], dtype: torch.dtype) -> None:
    """Compare a kernel with float64 formulas and, as strictly, with torch's operations in the same precision."""
    rounding = 3e-6 if dtype == torch.float32 else 0.02
    x, *others = tensors
    given = [x.to(dtype), *others]
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    found, wanted = ours(*leaves), plain(*exact)
    assert found.dtype == dtype
    weights = drawn(*found.shape, seed=3).to(dtype)
    found.backward(weights)
    wanted.backward(weights.double().view_as(wanted))
    pairs = [
        (found.double().view_as(wanted), wanted),
        *((a.grad.double(), b.grad) for a, b in zip(leaves, exact, strict=True)),
    ]
    for one, other in pairs:
        assert (one - other).norm() <= rounding * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", MODULATIONS.values(), ids=MODULATIONS)
def test_modulated_layer_norm(rows: tuple[int, int], dtype: torch.dtype) -> None:
    shift, scale, *_ = modulation(rows)
    compare(
        lambda x, shift, scale: ModulatedLayerNorm.apply(x, shift, scale, 1.0, EPS)[0],
        lambda x, shift, scale: fused.modulated_layer_norm(x, shift, scale, EPS)[0],
        [3 * drawn(BATCH, TOKENS, WIDTH, seed=1) + 1, shift, scale],
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_with_weight_and_bias_and_its_residual(dtype: torch.dtype) -> None:
    compare(
        lambda x, bias, weight: sum(
            ModulatedLayerNorm.apply(x, *(row[None, None, None] for row in (bias, weight)), 0.0, EPS)
        ),
        lambda x, bias, weight: sum(fused.wide_layer_norm(x, weight, bias, EPS)),
        [drawn(BATCH, TOKENS, WIDTH, seed=1), drawn(WIDTH, seed=4), drawn(WIDTH, seed=5)],
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", MODULATIONS.values(), ids=MODULATIONS)
def test_gated_addition(rows: tuple[int, int], dtype: torch.dtype) -> None:
    x, update = (drawn(BATCH, TOKENS, WIDTH, seed=seed) for seed in (1, 2))
    compare(AddGated.apply, fused.add_gated, [x, update.to(dtype), modulation(rows)[2]], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [True, False])
def test_rotated_rms_norm(turned: bool, dtype: torch.dtype) -> None:
    table = rotation_table(HEAD_DIM, (2, 5, 7), torch.device("cpu")) if turned else None
    exact = None if table is None else table.double()
    compare(
        lambda x, weight: RotatedRMSNorm.apply(x, weight, table, EPS),
        lambda x, weight: fused.rotated_rms_norm(x, weight, EPS, HEADS, exact),
        [2 * drawn(BATCH, TOKENS, WIDTH, seed=1), drawn(WIDTH, seed=5)],
        dtype,
    )


def test_what_needs_no_gradient_gets_none() -> None:
    """Partial sums are neither made nor stored."""
    x = drawn(BATCH, TOKENS, WIDTH, seed=1).requires_grad_()
    shift, scale, gate, *_ = modulation((BATCH, 2))
    normed, _ = ModulatedLayerNorm.apply(x, shift, scale, 1.0, EPS)
    turned = RotatedRMSNorm.apply(AddGated.apply(normed, x, gate), torch.ones(WIDTH), None, EPS)
    (found,) = torch.autograd.grad(turned.sum(), x)
    exact = x.detach().double().requires_grad_()
    normed, _ = fused.modulated_layer_norm(exact, shift, scale, EPS)
    plain = fused.rms_norm(fused.add_gated(normed, exact, gate), torch.ones(WIDTH).double(), EPS)
    (wanted,) = torch.autograd.grad(plain.sum(), exact)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
