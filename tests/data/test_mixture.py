"""Several folders of shards as one stream of samples."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import torch

from anyflow_train.config.run import Data
from anyflow_train.data.loader import Loader
from anyflow_train.data.manifest import MANIFEST, PromptTexts, parse_manifest, write_manifest, write_prompt_texts
from anyflow_train.data.mixture import ShardMixture, open_training
from anyflow_train.data.order import MixedOrder, SampleOrder
from anyflow_train.errors import UserError
from tests.data.helpers import TEXT_DIM, make_shards, numbers, take

GLOBAL = 8


def make_data(folder: Path, sizes: tuple[int, ...], weights: tuple[float, ...] = ()) -> Data:
    places = tuple(str(make_shards(folder / str(number), [size])) for number, size in enumerate(sizes))
    return Data(shards=places, weights=weights, frames=5, height=32, width=32)


def loader(shards: ShardMixture, positions: list[tuple[int, ...]], start: int = 0, workers: int = 0) -> Loader:
    return Loader(shards, 5, GLOBAL, positions, (4,), workers, start)


def test_the_order_of_one_set_is_that_of_earlier_versions(tmp_path: Path) -> None:
    order = open_training(make_data(tmp_path, (10,))).order(5, None)
    found = [2, 3, 0, 8, 7, 6, 4, 1, 9, 5, 7, 8, 6, 5, 1, 2, 4, 3, 0, 9]
    assert [order.index(position) for position in range(20)] == found
    found = [2, 3, 0, 5, 1, 6, 4, 3, 0, 6, 5, 1, 2, 4]
    assert [SampleOrder(5, (4, 0, 3)).index(position) for position in range(14)] == found


def test_shares_are_exact_in_every_cycle_and_each_set_keeps_its_own_order() -> None:
    orders = (SampleOrder(5, (4, 3)), SampleOrder(5, (5,), None, 1))
    mixed = MixedOrder(5, orders, (3, 1))
    found = [mixed.index(position) for position in range(80)]
    for start in range(0, 80, 4):
        assert sum(index < 7 for index in found[start : start + 4]) == 3
    # Each position of a set's own stream is used once.
    assert Counter(index for index in found if index < 7) == Counter(orders[0].index(place) for place in range(60))
    assert Counter(index - 7 for index in found if index >= 7) == Counter(orders[1].index(place) for place in range(20))


def test_without_weights_every_sample_is_used_once_in_an_epoch(tmp_path: Path) -> None:
    mixture = open_training(make_data(tmp_path, (5, 11)))
    order = mixture.order(5, None)
    for epoch in range(3):
        assert sorted(order.index(epoch * 16 + offset) for offset in range(16)) == list(range(16))
        assert {order.epoch(epoch * 16 + offset) for offset in range(16)} == {epoch}


@pytest.mark.parametrize("world", [1, 2])
def test_any_world_and_any_start_see_the_same_samples(tmp_path: Path, world: int) -> None:
    mixture = open_training(make_data(tmp_path, (5, 11), (3, 1)))
    whole = take(iter(loader(mixture, [tuple(range(GLOBAL))])), 6)
    for rank in range(world):
        positions = [tuple(range(rank, GLOBAL, world))]
        with closing(loader(mixture, positions, start=2, workers=2)) as source:
            for (part,), (step,) in zip(take(iter(source), 4), whole[2:], strict=True):
                assert part.keys == tuple(step.keys[position] for position in part.positions)
                assert numbers([part]) == [numbers([step])[position] for position in part.positions]


def test_sets_that_do_not_fit_each_other_are_refused_by_name(tmp_path: Path) -> None:
    data = make_data(tmp_path, (2, 2))
    folder = tmp_path / "1"
    manifest = parse_manifest((folder / MANIFEST).read_bytes(), "")
    codec = manifest.codec.model_copy(update={"vae": "other"})
    write_manifest(folder, manifest.model_copy(update={"codec": codec, "negative_prompt": "blurred"}))
    write_prompt_texts(folder / "text.safetensors", PromptTexts(torch.ones(2, TEXT_DIM), ()))
    with pytest.raises(UserError) as caught:
        open_training(data)
    first, second = caught.value.errors
    assert str(first).startswith(f"data.shards: {folder} was encoded with vae other, but {tmp_path / '0'} with abc")
    assert "has the negative prompt 'blurred', but" in str(second)
