"""Keys and values of chunks that are done, for the next chunk to attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from anyflow_train.models.attend import AttentionPattern, attend


@dataclass(frozen=True)
class KVCache:
    """What the blocks computed for the chunks before.

    Attributes:
        keys, values: (B, L, H, head_dim) per block, the keys rotated to where their tokens lie in the video. They are
            constants: no gradient goes through them.
        chunks: frames of each chunk in it.
        grid: (rows, columns) of full-size patches of a frame.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    chunks: tuple[int, ...]
    grid: tuple[int, int]

    @classmethod
    def empty(cls) -> KVCache:
        """Of no chunk: for the first one."""
        return cls((), (), (), (0, 0))

    @property
    def tokens(self) -> int:
        """L of each block."""
        return self.keys[0].shape[1] if self.keys else 0

    def check_chunks(self, wanted: tuple[int, ...]) -> None:
        """Raises ValueError: it holds other chunks than `wanted`."""
        if self.chunks != wanted:
            raise ValueError(f"kv_cache holds chunks of {self.chunks} frames, but those before the new one: {wanted}")

    def check_shapes(self, blocks: int, batch: int, tokens: int, grid: tuple[int, int]) -> None:
        """Raises ValueError: it is of another network, or of latents of another size."""
        if self.grid != grid:
            raise ValueError(f"kv_cache is of frames of {self.grid} patches, but the new chunk has {grid}")
        found = (len(self.keys), self.keys[0].shape[0], self.tokens)
        if found != (blocks, batch, tokens):
            names = "blocks, samples and tokens"
            raise ValueError(f"kv_cache is of {found} {names}, but the new chunk needs {(blocks, batch, tokens)}")

    def views(self) -> list[AttentionPattern]:
        """For each block, what a new chunk attends to; nothing for an empty cache."""
        return [AttendWithCache(key, value) for key, value in zip(self.keys, self.values, strict=True)]


@dataclass
class AnyFlowFARTransformerOutput(BaseOutput):
    """
    Attributes:
        sample: (B, F, C_out, H, W) velocity of the noisy frames; None where only a cache was asked for.
        kv_cache: the cache that was made or used, if any.
    """

    sample: Tensor | None = None
    kv_cache: KVCache | None = None


@dataclass(frozen=True)
class AttendWithCache:
    """A new chunk's tokens see those of the cache and each other."""

    keys: Tensor
    values: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Three times (B, S, H, head_dim) -> (B, S, D)."""
        return attend(query, torch.cat((self.keys, key), dim=1), torch.cat((self.values, value), dim=1))


@dataclass(frozen=True)
class RecordKV:
    """Attention as in `view`, with the keys and values put into `kept`, block after block."""

    view: AttentionPattern
    kept: list[tuple[Tensor, Tensor]]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Three times (B, S, H, head_dim) -> (B, S, D)."""
        _keep(self.kept, key, value)
        return self.view.attend(query, key, value)


@dataclass(frozen=True)
class StopAfterKV:
    """Of the last block only the keys and values, put into `kept`: nobody reads what else it would compute."""

    kept: list[tuple[Tensor, Tensor]]

    def keep(self, key: Tensor, value: Tensor) -> None:
        """Twice (B, S, H, head_dim)."""
        _keep(self.kept, key, value)


def _keep(kept: list[tuple[Tensor, Tensor]], key: Tensor, value: Tensor) -> None:
    # Under autocast the norm may leave float32 keys, which attention rounds: rounded here, they take half the memory.
    kept.append((key.to(value.dtype), value))
