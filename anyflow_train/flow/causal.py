"""Generating a clip chunk by chunk: each new chunk starts from noise, and sees those before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from anyflow_train.config.chunks import Chunks
from anyflow_train.flow.types import CachedContext, CausalFlowMap, Condition, FlowMap, Prefix

Generate = Callable[[Tensor, Condition], Tensor]
"""Noise of some frames and their condition -> those frames."""


def chunk_by_chunk(
    flow_map: CausalFlowMap,
    z: Tensor,
    condition: Condition,
    chunks: Chunks,
    generate: Generate,
    conditioning: Tensor | None = None,
) -> Tensor:
    """A clip (B, F, C, H, W) from noise z of that shape.

    Gradient flows through every chunk's own generation, not through what later chunks see of it.

    Args:
        generate: makes a chunk.
        conditioning: (B, P, C, H, W) the clip's first frames, clean: whole chunks.

    Raises:
        ValueError: the frames of z are not those of the chunks, or the given ones no whole chunks.
    """
    if z.shape[1] != sum(chunks.partition):
        raise ValueError(f"{z.shape[1]} latent frames are not those of the chunks {list(chunks.partition)}")
    known = 0 if conditioning is None else chunks.whole(conditioning.shape[1])
    x = z[:, :0] if conditioning is None else conditioning
    for seen in list(chunks.growing())[known:]:
        memory = None if len(seen) == 1 else flow_map.encode_context(x.detach(), seen[:-1], condition)
        noise = z[:, sum(seen[:-1]) : sum(seen)]
        x = torch.cat((x, generate(noise, condition.after(CachedContext(seen, memory)))), dim=1)
    return x


Sampler = Callable[[FlowMap, Tensor, Condition, int, float], Tensor]
"""(flow map, noise, condition, steps, shift) -> latents: `flow.sampler.sample`, and `sample_euler` for teachers."""


@dataclass(frozen=True)
class ClipSampler:
    """Samples clips, with frames given or not.

    Attributes:
        sampler: makes all frames, or a chunk.
        chunks: of a clip that is made chunk by chunk, every one in so many steps; None: all frames together.
    """

    sampler: Sampler
    chunks: Chunks | None = None

    @torch.no_grad()
    def __call__(
        self,
        flow_map: FlowMap,
        z: Tensor,
        condition: Condition,
        steps: int,
        shift: float,
        conditioning: Tensor | None = None,
    ) -> Tensor:
        """A clip (B, F, C, H, W) from noise z of that shape, the first frames being `conditioning` (B, P, C, H, W).

        Raises:
            ValueError: as `chunk_by_chunk` and `after_prefix`.
        """

        def generate(noise: Tensor, condition: Condition) -> Tensor:
            return self.sampler(flow_map, noise, condition, steps, shift)

        if self.chunks is None:
            return after_prefix(z, condition, generate, conditioning)
        return chunk_by_chunk(cast(CausalFlowMap, flow_map), z, condition, self.chunks, generate, conditioning)


def after_prefix(z: Tensor, condition: Condition, generate: Generate, conditioning: Tensor | None) -> Tensor:
    """A clip whose frames after the given ones are generated all together.

    Args:
        z: (B, F, C, H, W) noise.
        conditioning: (B, P, C, H, W) the clip's first frames, clean; None: there are none.

    Raises:
        ValueError: nothing is left to generate.
    """
    if conditioning is None:
        return generate(z, condition)
    if conditioning.shape[1] >= z.shape[1]:
        raise ValueError(f"{conditioning.shape[1]} latent frames are given of {z.shape[1]}: none is left to generate")
    return torch.cat(
        (conditioning, generate(z[:, conditioning.shape[1] :], condition.after(Prefix(conditioning)))), dim=1
    )
