"""Cached context: keys and values of finished chunks, to which the next chunk attends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from anyflow_train.models.attend import AttentionPattern, attend


@dataclass(frozen=True)
class KVCache:
    """Keys and values of the chunks before the one that is generated. Without arguments, it is empty.

    Attributes:
        keys, values: (B, L, H, head_dim) per block, without gradient. The keys are rotated to their positions in the
            video.
        chunks: frames of each cached chunk.
        grid: (rows, columns) of patches of the usual size in a frame.
    """

    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    chunks: tuple[int, ...] = ()
    grid: tuple[int, int] = (0, 0)

    def check_chunks(self, wanted: tuple[int, ...]) -> None:
        """Check the cached chunks. Raises ValueError if they are not `wanted`."""
        if self.chunks != wanted:
            raise ValueError(
                f"kv_cache holds chunks of {self.chunks} frames, but the new chunk follows chunks of {wanted}"
            )

    def check_shapes(self, blocks: int, batch: int, tokens: int, grid: tuple[int, int]) -> None:
        """Check the shapes. Raises ValueError if the cache is from another network or another size of latents."""
        if self.grid != grid:
            raise ValueError(f"kv_cache has frames of {self.grid} patches, but the new chunk has {grid}")
        found = (len(self.keys), *self.keys[0].shape[:2])
        if found != (blocks, batch, tokens):
            names = "blocks, samples and tokens"
            raise ValueError(f"kv_cache has {found} {names}, but the new chunk needs {(blocks, batch, tokens)}")

    def patterns(self) -> list[AttentionPattern]:
        """Attention pattern of a new chunk, for each block; empty for an empty cache."""
        return [AttendWithCache(key, value) for key, value in zip(self.keys, self.values, strict=True)]


@dataclass
class AnyFlowFARTransformerOutput(BaseOutput):
    """Output of the causal network.

    Attributes:
        sample: (B, F, C_out, H, W) velocity of the noisy frames; None if the call only encoded context.
        kv_cache: the cache that was created or used; None for a call without cache.
    """

    sample: Tensor | None = None
    kv_cache: KVCache | None = None


@dataclass(frozen=True)
class AttendWithCache:
    """Attention pattern of a new chunk: its tokens see the cached tokens and each other."""

    keys: Tensor
    values: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute self-attention. query, key, value: (B, S, H, head_dim). Returns (B, S, D)."""
        return attend(query, torch.cat((self.keys, key), dim=1), torch.cat((self.values, value), dim=1))


@dataclass(frozen=True)
class RecordKV:
    """Attention pattern that attends as `pattern`, and appends the keys and values of each block to `kept`."""

    pattern: AttentionPattern
    kept: list[tuple[Tensor, Tensor]]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute self-attention. query, key, value: (B, S, H, head_dim). Returns (B, S, D)."""
        StopAfterKV(self.kept).keep(key, value)
        return self.pattern.attend(query, key, value)


@dataclass(frozen=True)
class StopAfterKV:
    """For the last block: appends its keys and values to `kept`, and skips the rest of the block, which is not used."""

    kept: list[tuple[Tensor, Tensor]]

    def keep(self, key: Tensor, value: Tensor) -> None:
        """Record keys and values, each (B, S, H, head_dim)."""
        # Under autocast the norm may return float32 keys, which attention rounds. Rounding them here halves the memory.
        self.kept.append((key.to(value.dtype), value))
