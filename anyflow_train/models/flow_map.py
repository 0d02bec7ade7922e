"""A network as a flow map: the one place where times in [0, 1] become the network's 0..1000."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow_train.flow.times import TIME_SCALE
from anyflow_train.flow.types import CachedContext, Condition, Prefix, TeacherForced
from anyflow_train.models.backbone import Backbone


@dataclass(frozen=True)
class NetworkFlowMap:
    """The flow map that a network computes.

    Attributes:
        network: itself, or an engine's wrapper that passes calls and attributes on. It gives the average velocity; a
            Wan2.1 teacher is one that is called at `r = t`.
        autocast_dtype: half precision of the matrix products; None computes in the precision of the weights.
    """

    network: Backbone
    autocast_dtype: torch.dtype | None

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        """The average velocity from `t` back to `r`.

        Args:
            x: (B, F, C, H, W) float32, the frames that are generated.
            t, r: (B,) or (B, F) float32 in [0, 1], `r <= t`. They stay float32 whatever the network computes in.
            condition: text (B, L, D) and image, of any floating dtype; frames that are given.

        Returns:
            (B, F, C, H, W) float32 (float64 for a float64 `x`).

        Raises:
            ValueError: chunks are given to a network that is not causal.
        """
        # Not its config: of that name a DeepSpeed engine has one of its own.
        past, causal = condition.past, hasattr(self.network, "far_patch_embedding")
        if isinstance(past, TeacherForced | CachedContext) and not causal:
            raise ValueError("chunks are given to a network that generates all frames together")
        if isinstance(past, Prefix):
            velocity = self._called(*_after(past.frames, x, t, r), condition, _one_chunk(past.frames, x, causal))
            return velocity[:, past.frames.shape[1] :]
        if isinstance(past, TeacherForced):
            # Nothing sees the clean copy of an only chunk.
            clean = past.clean.to(self._dtype) if len(past.chunks) > 1 else None
            chunks = {"chunk_partition": past.chunks, "clean_hidden_states": clean}
            return self._called(*_after(past.context, x, t, r), condition, chunks)
        if isinstance(past, CachedContext):
            return self._called(x, t, r, condition, {"chunk_partition": past.chunks, "kv_cache": past.kv_cache})
        return self._called(x, t, r, condition, _one_chunk(None, x, causal))

    @torch.no_grad()
    def encode_context(self, x: Tensor, chunks: tuple[int, ...], condition: Condition) -> object:
        """Keys and values of the clean frames x (B, F, C, H, W) of these chunks: see `flow.types.CausalFlowMap`."""
        now = x.new_zeros(x.shape[0], dtype=torch.float32)
        # Plain tensors, whatever the engine wraps: a module's outputs that are no tensors pass it untouched.
        return self._outputs(x, now, now, condition, {"chunk_partition": chunks, "return_kv_cache": True})[1]

    def _called(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition, more: Mapping[str, Any]) -> Tensor:
        velocity = self._outputs(x, t, r, condition, more)[0]
        return velocity.to(torch.promote_types(x.dtype, torch.float32))

    def _outputs(
        self, x: Tensor, t: Tensor, r: Tensor, condition: Condition, more: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        dtype, image = self._dtype, condition.image
        with torch.autocast(x.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return self.network(
                x.to(dtype),
                timestep=TIME_SCALE * t.float(),
                r_timestep=TIME_SCALE * r.float(),
                encoder_hidden_states=condition.text.to(dtype),
                encoder_hidden_states_image=None if image is None else image.to(dtype),
                return_dict=False,
                **more,
            )

    @property
    def _dtype(self) -> torch.dtype:
        return self.network.patch_embedding.weight.dtype


def _after(given: Tensor, x: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All frames, and the times (B, F) of each: those that are given are clean."""
    if given.shape[1] == 0:
        return x, t, r
    clean = t.new_zeros(given.shape[:2])

    def by_frame(time: Tensor) -> Tensor:
        rows = time[:, None] if time.ndim == 1 else time
        return torch.cat((clean, rows.expand(x.shape[:2])), dim=1)

    return torch.cat((given.to(x.dtype), x), dim=1), by_frame(t), by_frame(r)


def _one_chunk(given: Tensor | None, x: Tensor, causal: bool) -> dict[str, Any]:
    """For a causal network: all frames as one chunk, which is attention without a mask."""
    frames = x.shape[1] + (0 if given is None else given.shape[1])
    return {"chunk_partition": (frames,)} if causal else {}
