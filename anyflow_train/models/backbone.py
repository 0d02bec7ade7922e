"""Base class of the bidirectional and the causal network, both Wan2.1's video transformer with two times.

It holds all weights except the causal network's second patch embedding, the loop over blocks, and the checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.loaders.single_file_model import FromOriginalModelMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from anyflow_train.flow.path import at_least_float32
from anyflow_train.models.attend import AttentionPattern
from anyflow_train.models.blocks import AnyFlowTransformerBlock
from anyflow_train.models.embeddings import ConditionEmbedder, PatchEmbedding
from anyflow_train.models.fused import modulated_layer_norm
from anyflow_train.models.kv_cache import StopAfterKV

# diffusers' list, and `delta_embedder`, which needs as much precision as `time_embedder`.
KEPT_IN_FP32 = ("time_embedder", "delta_embedder", "scale_shift_table", "norm1", "norm2", "norm3")


class Backbone(ModelMixin, ConfigMixin, PeftAdapterMixin, FromOriginalModelMixin):
    """Base class of both networks. Their constructors document the arguments and register them as the config.

    Raises:
        ValueError: invalid `patch_size`, `attention_head_dim`, `deltatime_type` or `image_dim`.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar = ["patch_embedding", "condition_embedder", "norm"]
    _no_split_modules: ClassVar = ["AnyFlowTransformerBlock"]
    _keep_in_fp32_modules: ClassVar = [*KEPT_IN_FP32]
    _repeated_blocks: ClassVar = ["AnyFlowTransformerBlock"]

    def __init__(self) -> None:
        super().__init__()
        config = self.config  # registered before the body of the constructor runs
        patch, heads = config.patch_size[1], config.num_attention_heads
        _check_architecture(config)
        dim = heads * config.attention_head_dim
        self.patch_embedding = PatchEmbedding(config.in_channels, dim, patch)
        self.condition_embedder = ConditionEmbedder(
            dim, config.freq_dim, config.text_dim, config.gate_value, config.deltatime_type
        )
        self.blocks = nn.ModuleList(
            AnyFlowTransformerBlock(dim, config.ffn_dim, heads, config.cross_attn_norm, config.eps)
            for _ in range(config.num_layers)
        )
        self.proj_out = nn.Linear(dim, (config.out_channels or config.in_channels) * patch**2)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build a network from a config, as in diffusers.

        Raises:
            ValueError: the config is of another class, whose weights would not all fit.
        """
        name = config.get("_class_name", cls.__name__) if isinstance(config, dict) else cls.__name__
        if name != cls.__name__:
            raise ValueError(
                f"the config names {name}, not {cls.__name__}; for a Wan2.1 transformer use anyflow_train.load_student"
            )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def config(self) -> Any:
        """Constructor arguments, as attributes and keys. The type in diffusers' annotation has only keys."""
        return self._internal_dict

    def _run_blocks(
        self,
        x: Tensor,
        context: Tensor,
        modulation: Tensor,
        rotation: Tensor,
        patterns: Sequence[AttentionPattern | StopAfterKV | None],
    ) -> Tensor:
        """Run all blocks, with gradient checkpointing if it is enabled.

        Arguments and result are those of a block, except that `patterns` has one attention pattern per block.
        """
        checkpoint = self._gradient_checkpointing_func if torch.is_grad_enabled() else None
        for block, pattern in zip(self.blocks, patterns, strict=True):
            if checkpoint is None or not self.gradient_checkpointing:
                x = block(x, context, modulation, rotation, pattern)
            else:
                x = checkpoint(block, x, context, modulation, rotation, pattern)
        return x

    def _project(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Project tokens to output patches: (B, S, D) and (B or 1, F or 1, D) -> (B, S, patch * patch * C_out)."""
        shift, scale = (at_least_float32(self.scale_shift_table) + embedding.unsqueeze(2)).chunk(2, dim=2)
        return self.proj_out(modulated_layer_norm(x, shift, scale, self.config.eps)[0])

    def _velocity(self, x: Tensor, embedding: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
        """Project tokens to latents: (B, S, D) -> (B, F, C_out, H, W). `grid`: rows and columns of a frame."""
        return unpatchify(self._project(x, embedding), frames, *grid, self.config.patch_size[1])

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        """Number of rows and columns of patches in a frame."""
        patch = self.config.patch_size[1]
        return latents.shape[3] // patch, latents.shape[4] // patch

    def _inputs(self, latents: Tensor, t: Tensor, r: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Check the inputs of a call, and embed the text.

        Returns:
            Source and target time, each (B or 1, F or 1), and text tokens (B, L, D).

        Raises:
            ValueError: wrong shape, height or width not divisible by the patch, or a grid that is too long.
        """
        shape, patch = tuple(latents.shape), self.config.patch_size[1]
        if len(shape) != 5 or shape[2] != self.config.in_channels:
            raise ValueError(f"hidden_states must be (B, F, {self.config.in_channels}, H, W), but its shape is {shape}")
        if shape[3] % patch or shape[4] % patch:
            raise ValueError(f"height and width must be multiples of the patch, {patch}, but hidden_states is {shape}")
        self._check_grid(shape[1], *self._grid(latents))
        if text.ndim != 3 or text.shape[0] != shape[0] or text.shape[2] != self.config.text_dim:
            wanted = f"({shape[0]}, L, {self.config.text_dim})"
            raise ValueError(f"encoder_hidden_states must be {wanted}, but its shape is {tuple(text.shape)}")
        t, r = torch.broadcast_tensors(frame_times(t, *shape[:2]), frame_times(r, *shape[:2]))
        return t, r, self.condition_embedder.text_embedder(text)

    def _check_grid(self, frames: int, rows: int, columns: int) -> None:
        if max(frames, rows, columns) > self.config.rope_max_seq_len:
            limit = f"rope_max_seq_len = {self.config.rope_max_seq_len}"
            raise ValueError(f"a grid of {frames} x {rows} x {columns} tokens is longer than {limit}")


def _check_architecture(config: Any) -> None:
    patch_size, head_dim = tuple(config.patch_size), config.attention_head_dim
    if len(patch_size) != 3 or patch_size[0] != 1 or patch_size[1] != patch_size[2] or patch_size[1] < 1:
        raise ValueError(f"patch_size must be (1, p, p), not {patch_size}")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"attention_head_dim must be even, not {head_dim}")
    if config.deltatime_type not in ("r", "t-r"):
        raise ValueError(f'deltatime_type must be "r" or "t-r", not {config.deltatime_type!r}')
    if config.image_dim is not None:
        raise ValueError(f"image_dim must be None, not {config.image_dim}: image embeddings are not supported")


def frame_times(times: Tensor, batch: int, frames: int) -> Tensor:
    """Reshape times of shape (), (B,) or (B, F) to (1, 1), (B, 1) or (B, F).

    Raises:
        ValueError: another shape.
    """
    shape = tuple(times.shape)
    if shape == ():
        return times.view(1, 1)
    if shape == (batch,):
        return times.view(batch, 1)
    if shape == (batch, frames):
        return times
    raise ValueError(f"a timestep must have the shape (), ({batch},) or ({batch}, {frames}), not {shape}")


def unpatchify(x: Tensor, frames: int, rows: int, columns: int, patch: int) -> Tensor:
    """Join patches: (B, F * rows * columns, patch * patch * C) -> (B, F, C, rows * patch, columns * patch)."""
    patches = x.unflatten(2, (patch, patch, -1)).unflatten(1, (frames, rows, columns))
    pixels = patches.transpose(3, 4).flatten(4, 5).flatten(2, 3)  # channels last: copies long runs
    return pixels.permute(0, 1, 4, 2, 3).contiguous()
