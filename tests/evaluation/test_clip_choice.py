"""Which samples are compared."""

import torch

from anyflow_train.evaluation.clip_choice import balanced_order, cycle, strata, varied


def test_any_first_part_of_the_order_is_balanced():
    captions = ["a", "a", "a", "b", "c", "b", "a"]
    order = balanced_order(captions)
    assert [captions[index] for index in order] == ["a", "b", "c", "a", "b", "a", "a"]
    assert sorted(order) == list(range(7))


def test_cycle_starts_again():
    assert cycle([5, 6], 5) == [5, 6, 5, 6, 5]


def test_shown_captions_differ_in_as_many_words_as_possible():
    captions = ["a red ball", "a red square", "a red ball", "a blue square", "a green star"]
    assert varied(captions, 4) == [0, 3, 4, 1]
    assert varied(captions, 9) == [0, 3, 4, 1, 2]
    assert varied(captions, 0) == []


def test_captions_are_strata_where_both_sets_repeat_them():
    left, right = strata(["a", "b", "b", "a"], ["b", "b", "a", "a", "a"])
    assert left.tolist() == [0, 1, 1, 0]
    assert right.tolist() == [1, 1, 0, 0, 0]


def test_captions_are_no_strata_where_one_is_single_or_missing():
    for captions, reference in ((["a", "b", "b"], ["a", "a", "b", "b"]), (["a", "a"], ["a", "a", "b", "b"])):
        left, right = strata(captions, reference)
        assert torch.equal(left, torch.zeros(len(captions), dtype=torch.int64))
        assert torch.equal(right, torch.zeros(len(reference), dtype=torch.int64))
