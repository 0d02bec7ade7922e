import itertools
import logging
import multiprocessing
import os
import signal
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from anyflow_train.data.batch import Batch
from anyflow_train.data.loader import Loader, pad_text
from anyflow_train.data.order import SampleOrder, step_text_length
from anyflow_train.data.shards import ShardSet
from anyflow_train.errors import UserError
from tests.data.helpers import alone, make_shards, numbers, take
from tests.data.prepare import crews

GLOBAL = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(str(make_shards(tmp_path_factory.mktemp("shards"), [10, 0, 7, 4])))


def loader(shards: ShardSet, local_positions=((0, 1, 2, 3, 4, 5, 6, 7),), workers: int = 0, start: int = 0) -> Loader:
    return Loader(alone(shards), 5, GLOBAL, local_positions, (4, 8), workers, start)


def equal(a: Batch, b: Batch) -> bool:
    tensors = ((a.latents, b.latents), (a.condition.text, b.condition.text), (a.negative.text, b.negative.text))
    return a.keys == b.keys and a.positions == b.positions and all(torch.equal(x, y) for x, y in tensors)


def test_slots_follow_the_stream_over_epoch_ends(shards: ShardSet) -> None:
    # 21 samples, 8 a step: the third step straddles two epochs, and after 21 steps every sample was seen 8 times.
    steps = take(iter(loader(shards)), 21)
    seen = [number for step in steps for number in numbers(step)]
    for start in range(0, len(seen), 21):
        assert sorted(seen[start : start + 21]) == list(range(21))


def test_without_shards_the_stream_is_that_of_the_order(tmp_path: Path) -> None:
    one = ShardSet.open(str(make_shards(tmp_path, [13])))
    seen = [number for step in take(iter(loader(one)), 4) for number in numbers(step)]
    assert seen == [SampleOrder(5, (13,)).index(position) for position in range(4 * GLOBAL)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("workers", [0, 3])
def test_any_world_sees_the_same_samples(shards: ShardSet, world: int, micro_batch: int, workers: int) -> None:
    reference = take(iter(loader(shards)), 4)
    for step in range(4):
        by_position = {}
        for rank in range(world):
            starts = range(0, GLOBAL, world * micro_batch)
            positions = [tuple(start + rank + world * i for i in range(micro_batch)) for start in starts]
            with closing(loader(shards, positions, workers, step)) as rank_loader:
                for batch in next(iter(rank_loader)):
                    by_position |= dict(
                        zip(batch.positions, zip(batch.keys, batch.condition.text, strict=True), strict=True)
                    )
        (whole,) = reference[step]
        assert tuple(by_position[position][0] for position in range(GLOBAL)) == whole.keys
        assert torch.equal(torch.stack([by_position[position][1] for position in range(GLOBAL)]), whole.condition.text)


@pytest.mark.parametrize(("workers", "start"), list(itertools.product([0, 1, 4], [0, 2, 3, 17])))
def test_resume_at_any_step_is_bit_equal(shards: ShardSet, workers: int, start: int) -> None:
    whole = take(iter(loader(shards)), 20)
    with closing(loader(shards, workers=workers, start=start)) as resumed:
        rest = take(iter(resumed), 20 - start)
    assert all(equal(a[0], b[0]) for a, b in zip(whole[start:], rest, strict=True))


def test_texts_are_padded_to_the_length_of_their_step(shards: ShardSet) -> None:
    for step, (batch,) in enumerate(take(iter(loader(shards)), 10)):
        length = step_text_length(5, step, (4, 8))
        assert batch.condition.text.shape == (8, length, 6)
        assert batch.negative.text.shape == (1, length, 6)
        for number, text in zip(numbers([batch]), batch.condition.text, strict=True):
            assert torch.equal(text[:, 0] != 0, torch.arange(length) < min(number % 5 + 1, length)) or number == 0


def test_padding_is_zero_and_cuts_like_wan() -> None:
    text = torch.ones(3, 2, dtype=torch.bfloat16)
    assert pad_text(text, 5).tolist() == [[1, 1]] * 3 + [[0, 0]] * 2
    assert pad_text(text, 2).tolist() == [[1, 1]] * 2
    assert pad_text(text, 2).dtype == torch.float32


def truncate(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def test_bad_samples_are_named_counted_and_replaced_the_same_way(tmp_path: Path, caplog) -> None:
    folder = make_shards(tmp_path, [10, 10])
    good = ShardSet.open(str(folder))
    whole = take(iter(loader(good)), 5)
    truncate(folder, "shard-000001.tar")
    bad = ShardSet.open(str(folder))
    runs = []
    for workers in (0, 3):
        with closing(
            Loader(alone(bad), 5, GLOBAL, [tuple(range(GLOBAL))], (4, 8), workers, max_bad_share=0.05)
        ) as source:
            with caplog.at_level(logging.WARNING):
                runs.append(take(iter(source), 5))
            assert source.bad_reads == source.reads - 5 * GLOBAL
            assert len(source.bad) >= 4
            assert all(name.startswith("shard-000001.tar: clip-01") for name in source.bad)
    assert all(equal(a[0], b[0]) for a, b in zip(*runs, strict=True))
    assert "shard-000001.tar: clip-01" in caplog.text
    assert "ends before it" in caplog.text
    lost = {name.split()[-1] for name in source.bad}
    for (before,), (after,) in zip(whole, runs[0], strict=True):
        for old, new in zip(before.keys, after.keys, strict=True):
            assert new not in lost
            assert new == old or old in lost


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run_with_their_names(tmp_path: Path, workers: int) -> None:
    folder = make_shards(tmp_path, [10, 10])
    truncate(folder, "shard-000001.tar")
    positions = [tuple(range(GLOBAL))]
    message = r"data.max_bad_share: 1\d of \d+ reads .* shard-000001.tar: clip-01"
    with closing(
        Loader(alone(ShardSet.open(str(folder))), 5, GLOBAL, positions, (8,), workers, max_bad_share=0.01)
    ) as source:
        steps = iter(source)
        take(steps, 2)  # a few bad samples are no reason to stop
        with pytest.raises(UserError, match=message) as caught:
            take(steps, 40)
    assert "\n" not in str(caught.value)


def test_no_bad_sample_is_allowed_where_none_is(tmp_path: Path) -> None:
    folder = make_shards(tmp_path, [10, 10])
    truncate(folder, "shard-000001.tar")
    shards = alone(ShardSet.open(str(folder)))
    with pytest.raises(UserError, match=r"data.max_bad_share"):
        next(iter(Loader(shards, 5, GLOBAL, [tuple(range(GLOBAL))], (8,), 0, max_bad_share=0)))


def test_broken_storage_stops_at_once(tmp_path: Path) -> None:
    folder = make_shards(tmp_path, [4])
    (folder / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match="20 samples in a row cannot be read"):
        next(iter(loader(ShardSet.open(str(folder)))))


def test_slots_outside_of_the_global_batch_are_refused(shards: ShardSet) -> None:
    with pytest.raises(ValueError, match="global batch of 8"):
        loader(shards, [(7, 8)])


def read_for_ever(location: str, steps: Connection) -> None:
    with closing(loader(ShardSet.open(location), workers=3)) as source:
        for _ in source:
            steps.send("step")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_reader_is_gone_at_once(shards: ShardSet, number: signal.Signals) -> None:
    steps, end = multiprocessing.Pipe(duplex=False)
    reader = crews.begin(read_for_ever, shards.location, end)
    assert steps.recv() == "step"
    os.kill(reader.pid or 0, number)
    reader.join(timeout=120)
    assert reader.exitcode == -number
