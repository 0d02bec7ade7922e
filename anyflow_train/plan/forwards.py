"""On which rows a run calls its networks: whole clips, or what a causal student sees of them."""

from __future__ import annotations

from math import prod

from anyflow_train.config.derived import chunk_rows, latent_shape, token_grid
from anyflow_train.config.network import Architecture
from anyflow_train.config.rows import Rows
from anyflow_train.config.run import RunConfig

Forwards = tuple[tuple[float, Rows], ...]
"""How often each is made."""


def whole_clip(config: RunConfig, architecture: Architecture) -> Forwards:
    """All frames together, in a network's patches."""
    latent = latent_shape(config.data, config.student.architecture.in_channels)
    return ((1.0, Rows.whole(prod(token_grid(latent, architecture)))),)


def trained_on(config: RunConfig) -> Forwards:
    """What the student's objective asks it for: of sequences of chunks, each with its share of the steps."""
    causal = chunk_rows(config)
    if causal is None:
        return whole_clip(config, config.student.architecture)
    draws = causal.chunks.draws(config.context.long_share)
    return tuple((share, causal.sequence(drawn)) for share, drawn in draws)


def jumped_on(config: RunConfig) -> Forwards:
    """A jump of a rollout, of every part of a clip that is rolled out by itself."""
    causal = chunk_rows(config)
    if causal is None:
        return whole_clip(config, config.student.architecture)
    return tuple((1.0, causal.next_chunk(count)) for count in range(len(causal.chunks.partition)))


def remembered(config: RunConfig) -> Forwards:
    """What a rollout encodes between its chunks."""
    causal = chunk_rows(config)
    if causal is None:
        return ()
    return tuple((1.0, causal.encoding(count)) for count in range(1, len(causal.chunks.partition)))


def bidirectional_share(config: RunConfig) -> float:
    """Share of the steps that also train flow matching on whole clips."""
    return 0.0 if config.student.architecture.causal is None else config.context.bidirectional_probability
