"""Generating a clip chunk by chunk: each new chunk starts from noise, and sees those before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from anyflow_train.config.chunks import Chunks
from anyflow_train.flow.types import CausalFlowMap, Condition, FlowMap, Prefix, Remembered

Generate = Callable[[Tensor, Condition], Tensor]
"""Noise of some frames and their condition -> those frames."""


def chunk_by_chunk(
    flow_map: CausalFlowMap,
    z: Tensor,
    condition: Condition,
    chunks: Chunks,
    generate: Generate,
    given: Tensor | None = None,
) -> Tensor:
    """A clip (B, F, C, H, W) from noise z of that shape.

    Gradient flows through every chunk's own generation, not through what later chunks see of it.

    Args:
        generate: makes a chunk.
        given: (B, P, C, H, W) the clip's first frames, clean: whole chunks.

    Raises:
        ValueError: the frames of z are not those of the chunks, or the given ones no whole chunks.
    """
    if z.shape[1] != sum(chunks.partition):
        raise ValueError(f"{z.shape[1]} latent frames are not those of the chunks {list(chunks.partition)}")
    known = 0 if given is None else chunks.whole(given.shape[1])
    x = z[:, :0] if given is None else given
    for seen in list(chunks.growing())[known:]:
        memory = None if len(seen) == 1 else flow_map.remember(x.detach(), seen[:-1], condition)
        noise = z[:, sum(seen[:-1]) : sum(seen)]
        x = torch.cat((x, generate(noise, condition.after(Remembered(seen, memory)))), dim=1)
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
        self, flow_map: FlowMap, z: Tensor, condition: Condition, steps: int, shift: float, given: Tensor | None = None
    ) -> Tensor:
        """A clip (B, F, C, H, W) from noise z of that shape, the first frames being `given` (B, P, C, H, W).

        Raises:
            ValueError: as `chunk_by_chunk` and `after_prefix`.
        """

        def generate(noise: Tensor, condition: Condition) -> Tensor:
            return self.sampler(flow_map, noise, condition, steps, shift)

        if self.chunks is None:
            return after_prefix(z, condition, generate, given)
        return chunk_by_chunk(cast(CausalFlowMap, flow_map), z, condition, self.chunks, generate, given)


def after_prefix(z: Tensor, condition: Condition, generate: Generate, given: Tensor | None) -> Tensor:
    """A clip whose frames after the given ones are generated all together.

    Args:
        z: (B, F, C, H, W) noise.
        given: (B, P, C, H, W) the clip's first frames, clean; None: there are none.

    Raises:
        ValueError: nothing is left to generate.
    """
    if given is None:
        return generate(z, condition)
    if given.shape[1] >= z.shape[1]:
        raise ValueError(f"{given.shape[1]} latent frames are given of {z.shape[1]}: none is left to generate")
    return torch.cat((given, generate(z[:, given.shape[1] :], condition.after(Prefix(given)))), dim=1)
