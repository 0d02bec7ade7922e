"""The student: Wan2.1's video transformer with two times, our own implementation of diffusers' class of the same name.

Weights, config and call are interchangeable with `diffusers.AnyFlowTransformer3DModel`; this one is built for training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.loaders.single_file_model import FromOriginalModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn

from anyflow_train.models.blocks import AnyFlowTransformerBlock
from anyflow_train.models.embeddings import ConditionEmbedder, PatchEmbedding
from anyflow_train.models.fused import modulated_layer_norm, wide
from anyflow_train.models.rotary import RotaryGrid
from anyflow_train.models.sequence_parallel import SequenceGroup


class AnyFlowTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, FromOriginalModelMixin):
    """The average velocity `u(x_t, t, r, text)` of latent videos.

    Args:
        patch_size: (1, p, p): a token is p x p latents of one frame.
        num_attention_heads, attention_head_dim: their product is the width D; the head dimension is even.
        in_channels: latent channels of the input.
        out_channels: latent channels of the output; None means `in_channels`.
        text_dim: width of the text embeddings.
        freq_dim: sinusoidal features of a time.
        ffn_dim: inner width of the feed-forward layers.
        num_layers: number of blocks.
        cross_attn_norm: whether a layer norm precedes the attention to the text.
        eps: of all norms.
        image_dim: width of the image embeddings (1280 for Wan2.1-I2V), None for text-to-video.
        rope_max_seq_len: the longest grid side, in tokens, that is accepted.
        gate_value: share of the second time in the time embedding.
        deltatime_type: the second time: "r", the target time, or "t-r", the interval.

    Raises:
        ValueError: a `patch_size`, `attention_head_dim` or `deltatime_type` other than those above.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar = ["patch_embedding", "condition_embedder", "norm"]
    _no_split_modules: ClassVar = ["AnyFlowTransformerBlock"]
    # diffusers' list and `delta_embedder`, which needs the precision as much as its twin.
    _keep_in_fp32_modules: ClassVar = [
        "time_embedder",
        "delta_embedder",
        "scale_shift_table",
        "norm1",
        "norm2",
        "norm3",
    ]
    _repeated_blocks: ClassVar = ["AnyFlowTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int | None = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
        image_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        gate_value: float = 0.25,
        deltatime_type: str = "r",
    ) -> None:
        super().__init__()
        _check_architecture(tuple(patch_size), attention_head_dim, deltatime_type)
        dim = num_attention_heads * attention_head_dim
        patch = patch_size[1]
        self.rope = RotaryGrid(attention_head_dim)
        self.patch_embedding = PatchEmbedding(in_channels, dim, patch)
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim, image_dim, gate_value, deltatime_type)
        self.blocks = nn.ModuleList(
            AnyFlowTransformerBlock(dim, ffn_dim, num_attention_heads, cross_attn_norm, eps) for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(dim, (out_channels or in_channels) * patch**2)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False
        self._sequence_group: SequenceGroup | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers, but the config of another class is refused: its weights would only half fit."""
        name = config.get("_class_name", cls.__name__) if isinstance(config, dict) else cls.__name__
        if name != cls.__name__:
            raise ValueError(
                f"the config names {name}, not {cls.__name__}; for a Wan2.1 transformer use {cls.__name__}.from_wan"
            )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_wan(
        cls,
        source: str | Path,
        *,
        gate_value: float = 0.25,
        deltatime_type: str = "r",
        torch_dtype: torch.dtype = torch.float32,
    ) -> AnyFlowTransformer3DModel:
        """A student that starts as a Wan2.1 text-to-video transformer: see `anyflow_train.models.wan.from_wan`."""
        from anyflow_train.models.wan import from_wan  # which imports this class

        return from_wan(source, gate_value=gate_value, deltatime_type=deltatime_type, torch_dtype=torch_dtype)

    def split_sequence(self, group: dist.ProcessGroup | None) -> None:
        """From now on split the tokens of each sample over the processes of `group`; None: no longer.

        All of them call forward, and backward, together and with the same whole samples; all get the same whole output.

        Gradients: every process computes the same loss from the output. What it gets, for parameters and inputs, is the
        part of the gradient that comes through its own tokens; the sum over the group is the gradient without a group.

        Raises:
            ValueError: the number of processes does not divide `num_attention_heads`, or this is none of them.
        """
        config: Any = self.config
        self._sequence_group = None if group is None else SequenceGroup.of(group, config.num_attention_heads)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        r_timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the average velocity.

        Args:
            hidden_states: (B, F, C, H, W) latents.
            timestep, r_timestep: source and target time in 0..1000, each of shape (), (B,) or (B, F).
            encoder_hidden_states: (B, L, text_dim) text embeddings.
            encoder_hidden_states_image: (B, I, image_dim) image embeddings, where the network has `image_dim`.
            attention_kwargs: {"scale": s} scales the LoRA adapters, if any.
            return_dict: False returns a tuple.

        Returns:
            (B, F, C_out, H, W), as the `sample` of the output or as the only entry of the tuple.

        Raises:
            ValueError: a shape other than those above, a height or width that the patch does not divide, a grid longer
                than `rope_max_seq_len`, fewer tokens in a frame than processes that split it.
        """
        batch, frames, _, height, width = self._check_latents(hidden_states)
        self._check_context(batch, encoder_hidden_states, encoder_hidden_states_image)
        t, r = torch.broadcast_tensors(_frame_times(timestep, batch, frames), _frame_times(r_timestep, batch, frames))
        config: Any = self.config
        patch = config.patch_size[1]
        rotation = self.rope((frames, height // patch, width // patch), hidden_states.device)

        embedding, modulation = self.condition_embedder(t, r)
        context = self.condition_embedder.context(encoder_hidden_states, encoder_hidden_states_image)
        x = self.patch_embedding(hidden_states.transpose(1, 2)).flatten(2).transpose(1, 2)
        part = None if self._sequence_group is None else self._sequence_group.part(frames, len(rotation) // frames)
        if part is not None:
            x, rotation = part.take(x), part.take(rotation.unsqueeze(0)).squeeze(0)
        checkpoint = self._gradient_checkpointing_func if torch.is_grad_enabled() else None
        for block in self.blocks:
            if checkpoint is None or not self.gradient_checkpointing:
                x = block(x, context, modulation, rotation, part)
            else:
                x = checkpoint(block, x, context, modulation, rotation, part)
        shift, scale = (wide(self.scale_shift_table) + embedding.unsqueeze(2)).chunk(2, dim=2)
        x = self.proj_out(modulated_layer_norm(x, shift, scale, config.eps))
        if part is not None:
            x = part.gather(x)

        sample = _unpatchify(x, frames, height // patch, width // patch, patch)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check_latents(self, latents: Tensor) -> torch.Size:
        config: Any = self.config
        shape = tuple(latents.shape)
        if len(shape) != 5 or shape[2] != config.in_channels:
            raise ValueError(f"hidden_states must be (B, F, {config.in_channels}, H, W), but its shape is {shape}")
        patch = config.patch_size[1]
        if shape[3] % patch or shape[4] % patch:
            raise ValueError(f"height and width must be multiples of the patch, {patch}, but hidden_states is {shape}")
        if max(shape[1], shape[3] // patch, shape[4] // patch) > config.rope_max_seq_len:
            raise ValueError(
                f"a grid of {shape[1]} x {shape[3] // patch} x {shape[4] // patch} tokens is longer than "
                f"rope_max_seq_len = {config.rope_max_seq_len}"
            )
        return latents.shape

    def _check_context(self, batch: int, text: Tensor, image: Tensor | None) -> None:
        config: Any = self.config
        if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != config.text_dim:
            raise ValueError(
                f"encoder_hidden_states must be ({batch}, L, {config.text_dim}), but its shape is {tuple(text.shape)}"
            )
        if image is None:
            return
        if config.image_dim is None:
            raise ValueError("encoder_hidden_states_image was given to a network without image_dim")
        if image.ndim != 3 or image.shape[0] != batch or image.shape[2] != config.image_dim:
            raise ValueError(
                f"encoder_hidden_states_image must be ({batch}, I, {config.image_dim}), "
                f"but its shape is {tuple(image.shape)}"
            )


def _check_architecture(patch_size: tuple[int, ...], head_dim: int, deltatime_type: str) -> None:
    if len(patch_size) != 3 or patch_size[0] != 1 or patch_size[1] != patch_size[2] or patch_size[1] < 1:
        raise ValueError(f"patch_size must be (1, p, p), not {patch_size}")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"attention_head_dim must be even, not {head_dim}")
    if deltatime_type not in ("r", "t-r"):
        raise ValueError(f'deltatime_type must be "r" or "t-r", not {deltatime_type!r}')


def _frame_times(times: Tensor, batch: int, frames: int) -> Tensor:
    """Times of shape (), (B,) or (B, F) as (1, 1), (B, 1) or (B, F): as few rows as carry the information."""
    shape = tuple(times.shape)
    if shape == ():
        return times.view(1, 1)
    if shape == (batch,):
        return times.view(batch, 1)
    if shape == (batch, frames):
        return times
    raise ValueError(f"a timestep must have the shape (), ({batch},) or ({batch}, {frames}), not {shape}")


def _unpatchify(x: Tensor, frames: int, rows: int, columns: int, patch: int) -> Tensor:
    """(B, F * rows * columns, patch * patch * C) -> (B, F, C, rows * patch, columns * patch)."""
    patches = x.unflatten(2, (patch, patch, -1)).unflatten(1, (frames, rows, columns))
    pixels = patches.transpose(3, 4).flatten(4, 5).flatten(2, 3)  # channels last: copies of long runs are fast
    return pixels.permute(0, 1, 4, 2, 3).contiguous()
