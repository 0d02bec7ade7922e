import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyflow_train.data.order import SampleOrder, permute, step_text_length

SHARDS = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 5), sizes=SHARDS, width=st.none() | st.integers(1, 9))
def test_every_epoch_holds_every_sample_once(seed: int, epoch: int, sizes: list[int], width: int | None) -> None:
    order, total = SampleOrder(seed, tuple(sizes), width), sum(sizes)
    epoch_indices = [order.index(position) for position in range(epoch * total, (epoch + 1) * total)]
    assert sorted(epoch_indices) == list(range(total))


def test_orders_differ_between_epochs_and_seeds() -> None:
    first = [SampleOrder(0, (50,)).index(position) for position in range(50)]
    second = [SampleOrder(0, (50,)).index(position) for position in range(50, 100)]
    other = [SampleOrder(1, (50,)).index(position) for position in range(50)]
    assert first != second
    assert first != other
    assert first != sorted(first)


@pytest.mark.parametrize("size", [2, 5, 24])
def test_a_sample_is_equally_likely_at_any_position_and_after_any_other(size: int) -> None:
    epochs = 1500
    places, pairs = Counter(), Counter()
    for epoch in range(epochs):
        order = [SampleOrder(7, (size,)).index(epoch * size + i) for i in range(size)]
        places.update(enumerate(order))
        pairs.update(itertools.pairwise(order))
    for counts, cells, expected in (
        (places, size * size, epochs / size),
        (pairs, size * (size - 1), epochs / size),
    ):
        chi_square = sum((counts[cell] - expected) ** 2 / expected for cell in counts)
        chi_square += (cells - len(counts)) * expected
        # Chi-square with about `cells` degrees of freedom has deviation sqrt(2 cells); six of them never fail by
        # chance.
        assert chi_square < cells + 6 * (2 * cells) ** 0.5


def test_one_position_of_a_huge_set_is_found_at_once() -> None:
    # The whole order of 10^12 samples cannot be built, but any of its positions can be computed.
    size = 10**12
    assert 0 <= SampleOrder(3, (size,)).index(10**15 + 123) < size


def test_a_group_of_shards_is_finished_before_the_next_one_starts() -> None:
    sizes = (5, 5, 5, 5, 5, 5)
    order = SampleOrder(4, sizes, shuffle_shards=2)
    shards = [order.index(position) // 5 for position in range(30)]
    groups = [set(shards[i : i + 10]) for i in range(0, 30, 10)]
    assert [len(group) for group in groups] == [2, 2, 2]
    assert set.union(*groups) == set(range(6))
    assert any(shards[i] != shards[i + 1] for i in range(3))  # and the two are mixed


def test_permute_is_a_bijection_for_every_small_size() -> None:
    for size in range(1, 70):
        keys = (size, 11, 5, 3, 2, 9, 8, 1)
        assert sorted(permute(i, size, keys) for i in range(size)) == list(range(size))


def test_replacements_are_a_sequence_of_their_own() -> None:
    order = SampleOrder(0, (100,))
    sequence = [order.replacement(17, attempt) for attempt in range(10)]
    assert sequence == [order.replacement(17, attempt) for attempt in range(10)]
    assert len(set(sequence)) > 5
    assert sequence != [order.replacement(18, attempt) for attempt in range(10)]


def test_text_lengths_are_drawn_anew_each_step() -> None:
    counts = Counter(step_text_length(0, step, (16, 16, 64, 512)) for step in range(4000))
    # Binomial deviations are about 32 and 27 counts: these are five of them.
    assert abs(counts[16] - 2000) < 160
    assert abs(counts[64] - 1000) < 140
    assert abs(counts[512] - 1000) < 140


def test_an_empty_set_has_no_order() -> None:
    with pytest.raises(ValueError, match="empty"):
        SampleOrder(0, (0, 0))
