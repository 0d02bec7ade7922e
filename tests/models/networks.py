"""Small networks for the tests: ours, diffusers', and inputs for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from anyflow_train.models.far_transformer import AnyFlowFARTransformer3DModel
from anyflow_train.models.transformer import AnyFlowTransformer3DModel

TINY_WAN = Path(__file__).parents[2] / "assets" / "tiny-wan"

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 40,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}


def small(**changes) -> AnyFlowTransformer3DModel:
    torch.manual_seed(0)
    return AnyFlowTransformer3DModel(**SMALL | changes)


def stock_twin(network: AnyFlowTransformer3DModel) -> diffusers.AnyFlowTransformer3DModel:
    """Build diffusers' class with the same config and weights."""
    names = set(diffusers.AnyFlowTransformer3DModel.__init__.__wrapped__.__annotations__) - {"return"}
    twin = diffusers.AnyFlowTransformer3DModel(**{name: network.config[name] for name in names})
    twin.load_state_dict(network.state_dict())
    return twin


def small_wan(**changes) -> diffusers.WanTransformer3DModel:
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(**SMALL | changes)


def inputs(batch: int = 3, frames: int = 3, text_length: int = 5) -> dict[str, torch.Tensor]:
    """Inputs of a small network: latents, times per frame (t and r in 0..1000) and text."""
    draw = torch.Generator().manual_seed(1)
    t = torch.rand(batch, frames, generator=draw) * 1000
    return {
        "hidden_states": torch.randn(batch, frames, 4, 6, 8, generator=draw),
        "timestep": t,
        "r_timestep": t * torch.rand(batch, frames, generator=draw),
        "encoder_hidden_states": torch.randn(batch, text_length, 20, generator=draw),
    }


FAR = {"full_chunk_limit": 2, "chunk_partition": (1, 2, 1)}


def small_far(**changes) -> AnyFlowFARTransformer3DModel:
    torch.manual_seed(0)
    return AnyFlowFARTransformer3DModel(**SMALL | FAR | changes)


def stock_far_twin(network: AnyFlowFARTransformer3DModel) -> diffusers.AnyFlowFARTransformer3DModel:
    """Build diffusers' class with the same config and weights."""
    names = set(diffusers.AnyFlowFARTransformer3DModel.__init__.__wrapped__.__annotations__) - {"return"}
    twin = diffusers.AnyFlowFARTransformer3DModel(**{name: network.config[name] for name in names})
    twin.load_state_dict(network.state_dict())
    return twin


def far_inputs(
    partition: tuple[int, ...], noisy: int, size: tuple[int, int] = (8, 12), batch: int = 2
) -> dict[str, Any]:
    """Inputs of a small causal network. The last `noisy` frames are noisy, the context has t = r = 0."""
    draw = torch.Generator().manual_seed(1)
    frames = sum(partition)
    t = torch.rand(batch, frames, generator=draw) * 1000
    t[:, : frames - noisy] = 0
    return {
        "hidden_states": torch.randn(batch, frames, 4, *size, generator=draw),
        "timestep": t,
        "r_timestep": t * torch.rand(batch, frames, generator=draw),
        "encoder_hidden_states": torch.randn(batch, 5, 20, generator=draw),
        "chunk_partition": list(partition),
    }


def clean_inputs(noisy: int, size: tuple[int, int] = (8, 12), batch: int = 2) -> dict[str, torch.Tensor]:
    """A clean copy of the noisy frames, with times per frame (diffusers has no other)."""
    draw = torch.Generator().manual_seed(2)
    return {
        "clean_hidden_states": torch.randn(batch, noisy, 4, *size, generator=draw),
        "clean_timestep": 20 * torch.rand(batch, noisy, generator=draw),
    }
