"""The student: Wan2.1's video transformer with two times, an implementation for training of diffusers' class.

Weights, config and call are interchangeable with `diffusers.AnyFlowTransformer3DModel`.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor

from anyflow_train.models.backbone import Backbone, unpatchify
from anyflow_train.models.embeddings import patch_tokens
from anyflow_train.models.rotary import RotaryGrid, Stretch
from anyflow_train.models.sequence_parallel import SequenceGroup


class AnyFlowTransformer3DModel(Backbone):
    """Network for the average velocity `u(x_t, t, r, text)` of latent videos.

    Example:
        network = AnyFlowTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)  # 1.3B
        velocity = network(latents, t, r, text).sample  # times in 0..1000; `NetworkFlowMap` takes times in [0, 1]

    Args:
        patch_size: (1, p, p); a token covers p x p latents of one frame.
        num_attention_heads: number of heads H.
        attention_head_dim: channels per head, even; the width D is H times this.
        in_channels: latent channels of the input.
        out_channels: latent channels of the output; None means `in_channels`.
        text_dim: width of the text embeddings.
        freq_dim: number of sinusoidal features of a time.
        ffn_dim: inner width of the feed-forward layers.
        num_layers: number of blocks.
        cross_attn_norm: whether cross-attention has a layer norm.
        eps: epsilon of all norms.
        image_dim: None. The key is part of diffusers' config; image embeddings are not supported.
        rope_max_seq_len: maximum number of frames, rows or columns of tokens.
        gate_value: weight of the second time in the time embedding, in [0, 1].
        deltatime_type: the second time, "r" (target time) or "t-r" (interval).

    Raises:
        ValueError: invalid `patch_size`, `attention_head_dim`, `deltatime_type` or `image_dim`.
    """

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
        image_dim: None = None,
        rope_max_seq_len: int = 1024,
        gate_value: float = 0.25,
        deltatime_type: str = "r",
    ) -> None:
        super().__init__()
        self.rope = RotaryGrid(attention_head_dim)
        self._sequence_group: SequenceGroup | None = None

    def split_sequence(self, group: dist.ProcessGroup | None) -> None:
        """Split the tokens of each sample over the processes of `group`; None disables it.

        All processes of the group must call forward and backward together, with the same samples. All get the same
        output and compute the same loss. On each process, the gradients of parameters and inputs only contain the part
        of its own tokens. Their sum over the group is the full gradient.

        Raises:
            ValueError: the number of processes does not divide `num_attention_heads`, or this process is not in the
                group.
        """
        self._sequence_group = None if group is None else SequenceGroup.of(group, self.config.num_attention_heads)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        r_timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the average velocity.

        Args:
            hidden_states: (B, F, C, H, W) latents.
            timestep, r_timestep: source and target time in 0..1000, each of shape (), (B,) or (B, F).
            encoder_hidden_states: (B, L, text_dim) text embeddings.
            attention_kwargs: {"scale": s} scales LoRA adapters that were loaded from a file.
            return_dict: whether to return an output object instead of a tuple.

        Returns:
            (B, F, C_out, H, W) velocity, as `sample` of the output or as the only entry of the tuple.

        Raises:
            ValueError: a wrong shape, height or width not divisible by the patch, a grid longer than
                `rope_max_seq_len`, or fewer tokens in a frame than processes that split it.
        """
        t, r, context = self._inputs(hidden_states, timestep, r_timestep, encoder_hidden_states)
        frames, grid = hidden_states.shape[1], self._grid(hidden_states)
        rotation = self.rope((Stretch((frames, *grid)),), hidden_states.device)

        embedding, modulation = self.condition_embedder(t, r)
        x = patch_tokens(self.patch_embedding, hidden_states)
        part = None if self._sequence_group is None else self._sequence_group.part(frames, len(rotation) // frames)
        if part is not None:
            x, rotation = part.take(x), part.take(rotation.unsqueeze(0)).squeeze(0)
        x = self._run_blocks(x, context, modulation, rotation, [part] * len(self.blocks))
        x = self._project(x, embedding)
        if part is not None:
            x = part.gather(x)

        sample = unpatchify(x, frames, *grid, self.config.patch_size[1])
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
