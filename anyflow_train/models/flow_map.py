"""A network as a flow map: the one place where times in [0, 1] become the network's 0..1000."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_train.flow.types import Condition
from anyflow_train.models.transformer import AnyFlowTransformer3DModel

TIME_SCALE = 1000.0


@dataclass(frozen=True)
class NetworkFlowMap:
    """The flow map that a network computes.

    Attributes:
        network: itself, or an engine's wrapper that passes calls and attributes on. It gives the average velocity; a
            Wan2.1 teacher is one that is called at `r = t`.
        autocast_dtype: half precision of the matrix products; None computes in the precision of the weights.
    """

    network: AnyFlowTransformer3DModel
    autocast_dtype: torch.dtype | None

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        """The average velocity from `t` back to `r`.

        Args:
            x: (B, F, C, H, W) float32.
            t, r: (B,) or (B, F) float32 in [0, 1], `r <= t`. They stay float32 whatever the network computes in.
            condition: text (B, L, D) and image, of any floating dtype.

        Returns:
            (B, F, C, H, W) float32 (float64 for a float64 `x`).
        """
        dtype = self.network.patch_embedding.weight.dtype
        image = condition.image
        with torch.autocast(x.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            (velocity,) = self.network(
                x.to(dtype),
                timestep=TIME_SCALE * t.float(),
                r_timestep=TIME_SCALE * r.float(),
                encoder_hidden_states=condition.text.to(dtype),
                encoder_hidden_states_image=None if image is None else image.to(dtype),
                return_dict=False,
            )
        return velocity.to(torch.promote_types(x.dtype, torch.float32))
