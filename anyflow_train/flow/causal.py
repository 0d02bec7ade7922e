"""Generate a clip chunk by chunk. Each new chunk starts from noise and sees the chunks before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from anyflow_train.config.chunks import Chunks
from anyflow_train.flow.types import CachedContext, CausalFlowMap, Condition, FlowMap, Prefix

Generate = Callable[[Tensor, Condition], Tensor]
"""(noise, condition) -> generated frames, both (B, F, C, H, W)."""


def chunk_by_chunk(
    flow_map: CausalFlowMap,
    z: Tensor,
    condition: Condition,
    chunks: Chunks,
    generate: Generate,
    conditioning: Tensor | None = None,
) -> Tensor:
    """Generate a clip from noise, one chunk after the other.

    Gradient flows through the generation of each chunk. It does not flow through the cached context.

    Args:
        flow_map: a causal network's average velocity; encodes the context of each chunk.
        z: (B, F, C, H, W) noise.
        condition: of the B samples, without a past.
        chunks: how the F frames are divided.
        generate: generates one chunk.
        conditioning: (B, P, C, H, W) first frames of the clip, clean; they must fill whole chunks. None generates all.

    Returns:
        (B, F, C, H, W), beginning with `conditioning`.

    Raises:
        ValueError: the chunks do not add up to F frames, or `conditioning` does not end at the end of a chunk.
    """
    if z.shape[1] != sum(chunks.partition):
        raise ValueError(f"the chunks {list(chunks.partition)} do not add up to {z.shape[1]} latent frames")
    known = 0 if conditioning is None else chunks.whole(conditioning.shape[1])
    x = z[:, :0] if conditioning is None else conditioning
    for seen in list(chunks.growing())[known:]:
        x = torch.cat((x, next_chunk(flow_map, x, z, condition, seen, generate)), dim=1)
    return x


def next_chunk(
    flow_map: CausalFlowMap, x: Tensor, z: Tensor, condition: Condition, seen: tuple[int, ...], generate: Generate
) -> Tensor:
    """Generate the newest chunk of a clip. Its cached context is freed when it is done.

    Args:
        flow_map, condition, generate: as in `chunk_by_chunk`.
        x: (B, P, C, H, W) frames of the chunks before it.
        z: (B, F, C, H, W) noise of the whole clip.
        seen: frames of all chunks so far, the new one last.
    """
    before = sum(seen[:-1])
    cache = flow_map.encode_context(x.detach(), seen[:-1], condition) if before else None
    return generate(z[:, before : sum(seen)], condition.after(CachedContext(seen, cache)))


Sampler = Callable[[FlowMap, Tensor, Condition, int, float], Tensor]
"""(flow map, noise, condition, steps, shift) -> latents: `flow.sampler.sample`, or `sample_euler` for teachers."""


@dataclass(frozen=True)
class ClipSampler:
    """Samples clips, with or without conditioning frames.

    Attributes:
        sampler: generates all frames together, or one chunk.
        chunks: division of a clip into chunks, each of which takes all calls; None generates all frames
            together.
    """

    sampler: Sampler
    chunks: Chunks | None = None

    @torch.no_grad()
    def __call__(
        self,
        flow_map: FlowMap,
        z: Tensor,
        condition: Condition,
        calls: int,
        shift: float,
        conditioning: Tensor | None = None,
    ) -> Tensor:
        """Sample clips.

        Args:
            flow_map: average velocity of a student, or velocity of a teacher.
            z: (B, F, C, H, W) noise.
            condition: of the B samples.
            calls: number of network calls, for each chunk.
            shift: time shift of the sampling grid.
            conditioning: (B, P, C, H, W) first frames of the clips, clean; None generates all frames.

        Returns:
            (B, F, C, H, W), beginning with `conditioning`.

        Raises:
            ValueError: see `chunk_by_chunk` and `after_prefix`.
        """

        def generate(noise: Tensor, condition: Condition) -> Tensor:
            return self.sampler(flow_map, noise, condition, calls, shift)

        if self.chunks is None:
            return after_prefix(z, condition, generate, conditioning)
        return chunk_by_chunk(cast(CausalFlowMap, flow_map), z, condition, self.chunks, generate, conditioning)


def after_prefix(z: Tensor, condition: Condition, generate: Generate, conditioning: Tensor | None) -> Tensor:
    """Generate all frames after the conditioning frames together.

    Args:
        z: (B, F, C, H, W) noise.
        condition: of the B samples.
        generate: generates the frames.
        conditioning: (B, P, C, H, W) first frames of the clip, clean; None generates all frames.

    Returns:
        (B, F, C, H, W), beginning with `conditioning`.

    Raises:
        ValueError: `conditioning` has F frames or more, so that none is left to generate.
    """
    if conditioning is None:
        return generate(z, condition)
    if conditioning.shape[1] >= z.shape[1]:
        raise ValueError(
            f"{conditioning.shape[1]} of {z.shape[1]} latent frames are conditioning frames: none is left to generate"
        )
    return torch.cat(
        (conditioning, generate(z[:, conditioning.shape[1] :], condition.after(Prefix(conditioning)))), dim=1
    )
