"""The causal student (FAR, arXiv 2503.19325), an implementation for training of diffusers' class of the same name.

Weights and config are interchangeable with `diffusers.AnyFlowFARTransformer3DModel`. A video is divided into chunks of
frames. The newest chunks have patches of the usual size. Older chunks have larger patches, which makes a long context
cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor

from anyflow_train.models.attend import AttentionPattern
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.chunk_layout import ChunkLayout, check_chunks
from anyflow_train.models.clean_copies import clean_copies
from anyflow_train.models.embeddings import PatchEmbedding, patch_tokens
from anyflow_train.models.kv_cache import AnyFlowFARTransformerOutput, KVCache, RecordKV, StopAfterKV
from anyflow_train.models.rotary import RotaryGrid, Stretch

Times = Sequence[Tensor]
"""Source and target time, each (B or 1, F or 1) in 0..1000."""


Patterns = Sequence[AttentionPattern | StopAfterKV | None]
"""Attention pattern of each block; None means all-to-all."""


class AnyFlowFARTransformer3DModel(Backbone):
    """Network for the average velocity `u(x_t, t, r, text)` of the newest chunks of latent videos, given older chunks.

    The arguments that are not listed are those of `AnyFlowTransformer3DModel`.

    Args:
        compressed_patch_size: (1, q, q) patches of older chunks; q is a multiple of the p in `patch_size`.
        full_chunk_limit: number of newest chunks, including the one being generated, with patches of `patch_size`.
        chunk_partition: frames per chunk of the training videos. Pipelines read it; the network does not use it.

    Raises:
        ValueError: invalid sizes, limit or partition.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        compressed_patch_size: tuple[int, int, int] = (1, 4, 4),
        full_chunk_limit: int = 3,
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
        chunk_partition: tuple[int, ...] = (1, 3, 3, 3, 3, 3, 3, 2),
    ) -> None:
        super().__init__()
        check_chunks(tuple(patch_size), tuple(compressed_patch_size), full_chunk_limit, tuple(chunk_partition))
        self.rope = RotaryGrid(attention_head_dim)
        # Last, so that all other random weights equal those of a bidirectional network with the same seed.
        dim = num_attention_heads * attention_head_dim
        self.far_patch_embedding = PatchEmbedding(in_channels, dim, compressed_patch_size[1])

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        r_timestep: Tensor,
        encoder_hidden_states: Tensor,
        chunk_partition: Sequence[int],
        clean_hidden_states: Tensor | None = None,
        clean_timestep: Tensor | None = None,
        kv_cache: KVCache | None = None,
        return_kv_cache: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> AnyFlowFARTransformerOutput | tuple[Any, ...]:
        """Predict the average velocity of the newest chunks, or encode chunks as context of the next one.

        There are three ways to call it.

        1. Without cache: `hidden_states` holds all chunks. Chunks older than the newest `full_chunk_limit` are clean
           context. The result is the velocity of the others, F_noisy frames. With `clean_hidden_states`, each noisy
           chunk sees clean copies of the full chunks before it; without, it sees those chunks themselves. A single
           chunk is a video with all-to-all attention.
        2. With `return_kv_cache`: `hidden_states` holds all chunks so far, clean. The result is the cached context of
           the next chunk, without gradient. The newest `full_chunk_limit - 1` chunks have patches of `patch_size`.
        3. With `kv_cache`: `hidden_states` is one new chunk, which sees itself and the cached context. The result is
           its velocity.

        Args:
            hidden_states: (B, F, C, H, W) latents.
            timestep, r_timestep: source and target time in 0..1000, each of shape (), (B,) or (B, F).
            encoder_hidden_states: (B, L, text_dim) text embeddings.
            chunk_partition: frames of each chunk, oldest first, including the new one. They add up to F, or with
                `kv_cache` to the frames of the cache and F.
            clean_hidden_states: (B, F_noisy, C, H, W) clean latents. The newest chunk is not used.
            clean_timestep: source and target time of the clean copies in 0..1000, of shape (), (B,) or (B, F_noisy);
                None means 0.
            kv_cache: cached context from a call with `return_kv_cache`.
            return_kv_cache: whether to encode the chunks as cached context.
            attention_kwargs: {"scale": s} scales LoRA adapters that were loaded from a file.
            return_dict: False returns a tuple: (sample,) without cache, else (sample, kv_cache).

        Returns:
            The velocity (B, F_noisy, C_out, H, W) as `sample`, and the cached context as `kv_cache`.

        Raises:
            ValueError: a wrong shape, height or width not divisible by a patch, a video longer than
                `rope_max_seq_len`, or a cache of other chunks or latents.
        """
        if (clean_hidden_states is not None) + (kv_cache is not None) + return_kv_cache > 1:
            raise ValueError("only one of clean_hidden_states, kv_cache and return_kv_cache can be given")
        *times, text = self._inputs(hidden_states, timestep, r_timestep, encoder_hidden_states)
        partition, sample = tuple(chunk_partition), None
        if return_kv_cache:
            layout = self._layout(partition, self._limit - 1, hidden_states)
            kv_cache = self._encode(hidden_states, times, text, layout)
        elif kv_cache is not None:
            sample = self._next_chunk(hidden_states, times, text, partition, kv_cache)
        else:
            layout, copies = self._layout(partition, self._limit, hidden_states), hidden_states[:, :0]
            if clean_hidden_states is not None:
                layout = layout.with_copies()
                copies, times = clean_copies(clean_hidden_states, clean_timestep, layout, hidden_states, times)
            patterns = [layout.attention()] * len(self.blocks)
            x, embedding = self._run_layout(hidden_states, copies, times, text, layout, patterns)
            # The outputs for context and clean copies are not used. A single row of times applies to all frames.
            x, embedding = x[:, -layout.full_tokens :], embedding[:, -sum(layout.full) :]
            sample = self._velocity(x, embedding, sum(layout.full), layout.grid)
        if return_dict:
            return AnyFlowFARTransformerOutput(sample, kv_cache)
        return (sample,) if kv_cache is None else (sample, kv_cache)

    def _run_layout(
        self, latents: Tensor, copies: Tensor, times: Times, text: Tensor, layout: ChunkLayout, patterns: Patterns
    ) -> tuple[Tensor, Tensor]:
        """Run all tokens of a layout through the blocks. Returns tokens (B, S, D) and the time embedding."""
        embedding, modulation = self.condition_embedder(*times)
        older = sum(layout.context)
        parts = (
            (self.far_patch_embedding, latents[:, :older]),
            (self.patch_embedding, copies),
            (self.patch_embedding, latents[:, older:]),
        )
        x = torch.cat([patch_tokens(patches, part) for patches, part in parts if part.shape[1]], dim=1)
        rotation = self.rope(layout.stretches(), latents.device)
        return self._run_blocks(x, text, layout.rows(modulation), rotation, patterns), embedding

    @torch.no_grad()
    def _encode(self, latents: Tensor, times: Times, text: Tensor, layout: ChunkLayout) -> KVCache:
        """Encode all chunks of a layout as keys and values."""
        kept: list[tuple[Tensor, Tensor]] = []
        patterns = [RecordKV(layout.attention(), kept)] * (len(self.blocks) - 1)
        self._run_layout(latents, latents[:, :0], times, text, layout, [*patterns, StopAfterKV(kept)])
        keys, values = zip(*kept, strict=True)
        return KVCache(keys, values, (*layout.context, *layout.full), layout.grid)

    def _next_chunk(
        self, latents: Tensor, times: Times, text: Tensor, partition: tuple[int, ...], cache: KVCache
    ) -> Tensor:
        """Predict the velocity of the chunk that follows the cached context."""
        frames, grid = latents.shape[1], self._grid(latents)
        if partition[-1:] != (frames,):
            raise ValueError(f"chunk_partition is {partition}, but hidden_states, its last chunk, has {frames} frames")
        self._check_grid(sum(partition), *grid)
        cache.check_chunks(partition[:-1])
        if cache.chunks:
            before = ChunkLayout.of(partition[:-1], self._limit - 1, grid, self._pool)
            cache.check_shapes(len(self.blocks), len(latents), before.tokens, grid)
        embedding, modulation = self.condition_embedder(*times)
        rotation = self.rope((Stretch((frames, *grid), sum(partition[:-1])),), latents.device)
        patterns = cache.patterns() if cache.chunks else [None] * len(self.blocks)
        x = self._run_blocks(patch_tokens(self.patch_embedding, latents), text, modulation, rotation, patterns)
        return self._velocity(x, embedding, frames, grid)

    def _layout(self, partition: tuple[int, ...], full_chunks: int, latents: Tensor) -> ChunkLayout:
        layout = ChunkLayout.of(partition, full_chunks, self._grid(latents), self._pool)
        if layout.frames != latents.shape[1]:
            raise ValueError(
                f"chunk_partition {partition} has {layout.frames} frames, but hidden_states has {latents.shape[1]}"
            )
        return layout

    @property
    def _limit(self) -> int:
        return self.config.full_chunk_limit

    @property
    def _pool(self) -> int:
        return self.config.compressed_patch_size[1] // self.config.patch_size[1]
