"""Tokens of chunks, counted without torch, against the network's own layout of them."""

from __future__ import annotations

import pytest

from anyflow_train.config.chunks import Chunks
from anyflow_train.config.compose import compose
from anyflow_train.config.derived import chunk_rows, derive, table
from anyflow_train.config.rows import ChunkRows, Rectangle, Rows
from anyflow_train.models.chunk_layout import ChunkLayout

GRID, POOL = (4, 6), 2
PARTITIONS = [(1, 3, 3, 3, 3, 2), (1, 2), (2,), (1, 1, 1, 1)]


def rows_of(partition: tuple[int, ...], limit: int) -> ChunkRows:
    return ChunkRows(Chunks(partition, limit), 24, 6)


def rectangles(layout: ChunkLayout) -> tuple[Rectangle, ...]:
    """Spans as lengths; two spans have to be joined."""
    return tuple(
        Rectangle(
            each.queries[1] - each.queries[0], sum(stop - start for start, stop in each.keys), len(each.keys) == 2
        )
        for each in layout.attention().segments
    )


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("limit", [2, 3])
def test_a_sequence_is_that_of_the_network(partition: tuple[int, ...], limit: int) -> None:
    rows = rows_of(partition, limit)
    for count in range(1, len(partition) + 1):
        drawn = rows.chunks.sequence(count)
        layout = ChunkLayout.of(drawn.chunks, limit, GRID, POOL).with_copies()
        sequence = rows.sequence(drawn)
        assert sequence.tokens == layout.tokens
        assert sequence.velocity == layout.full_tokens
        assert sequence.context == 6 * drawn.context
        assert sequence.seen == rectangles(layout)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("limit", [2, 3])
def test_an_encoding_is_that_of_the_network(partition: tuple[int, ...], limit: int) -> None:
    rows = rows_of(partition, limit)
    for count in range(1, len(partition)):
        layout = ChunkLayout.of(partition[:count], limit - 1, GRID, POOL)
        encoding, following = rows.encoding(count), rows.next_chunk(count)
        assert encoding.tokens == encoding.remembered == following.remembered == layout.tokens
        assert encoding.seen == rectangles(layout)
        assert following.seen == (Rectangle(24 * partition[count], layout.tokens + 24 * partition[count], True),)


def test_one_chunk_is_a_clip() -> None:
    rows = rows_of((3,), 2)
    assert rows.sequence(rows.chunks.sequence(1)) == rows.next_chunk(0) == Rows.whole(72)


def test_sequences_of_the_published_run() -> None:
    """1,560 tokens a frame, 390 where compressed: one frame at least, and at most the seven chunks before the last."""
    config = compose("train", ["experiment=wan1_3b_causal"], None, 8)
    found = derive(config, 8).sequences
    rows = chunk_rows(config)
    assert found is not None
    assert rows is not None
    assert (rows.full, rows.context) == (1560, 390)
    assert (found.fewest, found.most) == (1560, 10 * 390 + (6 + 9) * 1560)
    short = [1, 1 + 4, 4 + 7]
    long = [(1, 6, 9), (4, 6, 9), (7, 6, 9), (10, 6, 9), (13, 6, 8)]
    mean = sum(short) * 1560 / 3 + sum(390 * far + 1560 * (copies + noisy) for far, copies, noisy in long) / 5
    assert found.mean == pytest.approx(mean / 2)


def test_what_a_person_is_told() -> None:
    told = dict(table(derive(compose("train", ["experiment=tiny_causal_on_policy"], None, 1), 1)))
    assert told["chunks"] == "1 + 2 + 2 latent frames, all but the newest 2 of a sequence compressed"
    assert "tokens, " in told["sequences"]
    assert told["rollouts"].endswith("for every chunk")
    other = dict(table(derive(compose("train", ["experiment=tiny_on_policy"], None, 1), 1)))
    assert not {"chunks", "sequences"} & set(other)
    assert not other["rollouts"].endswith("chunk")
