"""Gradient checkpointing: choose what the backward pass recomputes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Callable[..., Any]
"""(block, *inputs) -> outputs. The backward pass recomputes the block."""

_ATTENTION = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)


def _all(block: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(block, *inputs, use_reentrant=False)


def _all_but_attention(block: Callable[..., Any], *inputs: Any) -> Any:
    """Recompute all except attention, which for long sequences takes most of the time and little memory to save."""
    contexts = partial(create_selective_checkpoint_contexts, _keep_attention)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


RECOMPUTE: Mapping[str, Recompute] = MappingProxyType({"block": _all, "selective": _all_but_attention})
"""Value of `student.gradient_checkpointing` -> function that calls a block."""
