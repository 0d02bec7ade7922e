"""A network as a flow map. Times in [0, 1] are converted to the network's 0..1000 only here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow_train.flow.times import TIME_SCALE
from anyflow_train.flow.types import CachedContext, Condition, TeacherForced
from anyflow_train.models.backbone import Backbone


@dataclass(frozen=True)
class NetworkFlowMap:
    """A flow map that calls a network: `NetworkFlowMap(network, torch.bfloat16)`.

    Attributes:
        network: the network, or an engine's wrapper that forwards calls and attributes. It predicts the average
            velocity; a Wan2.1 teacher is called at `r = t`.
        autocast_dtype: half precision of matrix products; None computes in the dtype of the weights.
    """

    network: Backbone
    autocast_dtype: torch.dtype | None

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        """Predict the average velocity from `t` back to `r`.

        Args:
            x: (B, F, C, H, W) float32, the frames that are generated.
            t, r: (B,) or (B, F) float32 in [0, 1], `r <= t`. They stay float32 in every precision of the network.
            condition: text (B, L, D), any floating dtype; conditioning frames.

        Returns:
            (B, F, C, H, W) float32 (float64 for a float64 `x`).

        Raises:
            ValueError: the condition has chunks, but the network is not causal.
        """
        # Do not read `network.config`: on a DeepSpeed engine, this is the config of DeepSpeed.
        past, causal = condition.past, hasattr(self.network, "far_patch_embedding")
        if isinstance(past, TeacherForced | CachedContext) and not causal:
            raise ValueError("the condition has chunks, but only a causal network can generate chunks")
        if isinstance(past, CachedContext):
            return self._called(x, t, r, condition, {"chunk_partition": past.chunks, "kv_cache": past.kv_cache})
        if isinstance(past, TeacherForced):
            # No chunk sees the clean copy of a single chunk.
            clean = past.clean.to(self._dtype) if len(past.chunks) > 1 else None
            chunks = {"chunk_partition": past.chunks, "clean_hidden_states": clean}
            return self._called(*_after(past.context, x, t, r), condition, chunks)
        before = x[:, :0] if past is None else past.frames
        # All frames are one chunk, with all-to-all attention.
        chunks = {"chunk_partition": (before.shape[1] + x.shape[1],)} if causal else {}
        velocity = self._called(*_after(before, x, t, r), condition, chunks)
        return velocity if past is None else velocity[:, before.shape[1] :]

    @torch.no_grad()
    def encode_context(self, x: Tensor, chunks: tuple[int, ...], condition: Condition) -> object:
        """Encode clean frames x (B, F, C, H, W) as cached context: see `flow.types.CausalFlowMap`."""
        now = x.new_zeros(x.shape[0], dtype=torch.float32)
        # The cache holds plain tensors also under an engine, whose wrapper does not change outputs of other types.
        return self._outputs(x, now, now, condition, {"chunk_partition": chunks, "return_kv_cache": True})[1]

    def _called(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition, more: Mapping[str, Any]) -> Tensor:
        velocity = self._outputs(x, t, r, condition, more)[0]
        return velocity.to(torch.promote_types(x.dtype, torch.float32))

    def _outputs(
        self, x: Tensor, t: Tensor, r: Tensor, condition: Condition, more: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        dtype = self._dtype
        with torch.autocast(x.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return self.network(
                x.to(dtype),
                timestep=TIME_SCALE * t.float(),
                r_timestep=TIME_SCALE * r.float(),
                encoder_hidden_states=condition.text.to(dtype),
                return_dict=False,
                **more,
            )

    @property
    def _dtype(self) -> torch.dtype:
        return self.network.patch_embedding.weight.dtype


def _after(past: Tensor, x: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put clean conditioning frames before x. Returns all frames, and their times (B, F)."""
    if past.shape[1] == 0:
        return x, t, r
    clean = t.new_zeros(past.shape[:2])

    def by_frame(time: Tensor) -> Tensor:
        rows = time[:, None] if time.ndim == 1 else time
        return torch.cat((clean, rows.expand(x.shape[:2])), dim=1)

    return torch.cat((past.to(x.dtype), x), dim=1), by_frame(t), by_frame(r)
