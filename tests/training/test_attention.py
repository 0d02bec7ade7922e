"""The kernel of attention: chosen for the device, tried on it, and used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from anyflow_train.training import attention
from anyflow_train.training.attention import attention_by, choose_kernel
from tests.training.helpers import settings

CPU = torch.device("cpu")


def config(**changes: Any) -> RunConfig:
    return RunConfig.model_validate(settings(Path("nowhere"), **changes))


def node(kernel: str) -> str:
    """Name of the computed attention in the autograd graph."""
    query = torch.randn(1, 2, 64, 16, requires_grad=True)
    with attention_by(kernel):
        return str(F.scaled_dot_product_attention(query, query, query).grad_fn)


def test_a_cpu_leaves_it_to_torch() -> None:
    assert choose_kernel(config(), CPU) == "sdpa"


def test_a_kernel_that_does_not_run_here_is_refused() -> None:
    with pytest.raises(UserError, match=r"does not run on a CPU for heads of 12 in fp32; use auto") as caught:
        choose_kernel(config(engine__attention="cudnn"), CPU)
    assert caught.value.where == "engine.attention"


def test_what_is_asked_for_is_used() -> None:
    assert choose_kernel(config(engine__attention="flash"), CPU) == "flash"
    assert "FlashAttentionForCpu" in node("flash")


def test_the_order_decides_and_the_rest_stays_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU supports only the unfused kernel of these two, so cuDNN's, which comes first, is skipped."""
    monkeypatch.setattr(attention, "OTHERS", (torch.nn.attention.SDPBackend.MATH,))
    assert "FlashAttention" not in node("cudnn")


@pytest.mark.parametrize(
    ("capability", "cudnn", "flash", "expected"),
    [
        ((9, 0), True, True, "cudnn"),
        ((9, 0), False, True, "flash"),
        ((8, 0), True, True, "flash"),
        ((7, 0), True, False, "sdpa"),
    ],
)
def test_auto_by_generation(
    capability: tuple[int, int], cudnn: bool, flash: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pretend that there is a GPU of this compute capability."""
    runs = {"cudnn": cudnn, "flash": flash}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "_problem", lambda config, device, name: None if runs[name] else "does not")
    assert choose_kernel(config(), torch.device("cuda")) == expected


# Half precision on a GPU has kernels that a CPU lacks; what a CPU can do of the same is tested above.
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_on_this_gpu_agrees_with_plain_attention() -> None:
    device = torch.device("cuda")
    kernel = choose_kernel(config(engine__precision="bf16", student__architecture__attention_head_dim=128), device)
    query, key, value = torch.randn(3, 1, 2, 512, 128, device=device)
    with attention_by(kernel):
        found = F.scaled_dot_product_attention(query.bfloat16(), key.bfloat16(), value.bfloat16())
    scores = (query @ key.mT / 128**0.5).softmax(-1) @ value
    # bfloat16 keeps 8 bits of the inputs and of the result
    assert (found.float() - scores).abs().max() < 0.05 * scores.abs().max()
