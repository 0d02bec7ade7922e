"""Batches of clips of several sizes: one size per step, on all processes."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.commands.preflight import check_files
from anyflow_train.config.base import ClipSize
from anyflow_train.config.positions import local_positions
from anyflow_train.config.run import Data, RunConfig
from anyflow_train.data.batch import Batch
from anyflow_train.data.loader import Loader
from anyflow_train.data.manifest import Bucket, Manifest, PromptTexts, check_compatible, parse_manifest
from anyflow_train.data.mixture import open_training, split_by_size
from anyflow_train.data.order import SampleOrder
from anyflow_train.data.prepare.writing import write_shard
from anyflow_train.data.shards import BadSampleError, Sample, ShardSet
from anyflow_train.errors import UserError
from anyflow_train.evaluation import nearest
from tests.data.helpers import TEXT_DIM, make_manifest, take
from tests.shards import write_shards
from tests.training.helpers import settings

GLOBAL = 8
BIG, WIDE, PICTURE = ClipSize(5, 32, 32), ClipSize(5, 16, 48), ClipSize(1, 32, 32)
SHAPES = {BIG: (2, 3, 4, 4), WIDE: (2, 3, 2, 6), PICTURE: (1, 3, 4, 4)}  # 32, 24 and 16 latents


def write(folder: Path, sizes: list[list[ClipSize]]) -> str:
    """Write a folder with a shard for each list, with a sample of each size."""
    buckets = tuple(Bucket(**size._asdict(), latent_shape=shape) for size, shape in SHAPES.items())
    number = 0
    parts = []
    for part in sizes:
        samples = []
        for size in part:
            latents = torch.full(SHAPES[size], float(number))
            samples.append(Sample(f"{folder.name}-{number}", latents, torch.ones(2, TEXT_DIM), ""))
            number += 1
        parts.append(samples)
    shapes = list(SHAPES.values())
    manifest = make_manifest().model_copy(update={"buckets": buckets})
    path = write_shards(folder, parts, manifest, PromptTexts(torch.ones(1, TEXT_DIM), ()))
    digits = [write_shard(path, f"shard-{n:06d}.tar", part, shapes=shapes).buckets for n, part in enumerate(parts)]
    content = parse_manifest((path / "manifest.json").read_bytes(), "")
    shards = tuple(one.model_copy(update={"buckets": text}) for one, text in zip(content.shards, digits, strict=True))
    (path / "manifest.json").write_text(content.model_copy(update={"shards": shards}).model_dump_json())
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    first = write(tmp_path / "a", [[BIG, WIDE, BIG, PICTURE], [WIDE, BIG]])
    second = write(tmp_path / "b", [[PICTURE, BIG, PICTURE, PICTURE]])
    buckets = [list(size) for size in (BIG, WIDE, PICTURE)]
    return Data.model_validate({"shards": [first, second], "frames": 5, "height": 32, "width": 32, "buckets": buckets})


def make_loader(data: Data, positions: list[tuple[int, ...]], start: int = 0, workers: int = 0) -> Loader:
    shards = open_training(data)
    return Loader(shards, 5, GLOBAL, positions, (4,), workers, start, buckets=split_by_size(shards, data.sizes))


def samples_of(step: list[Batch]) -> dict[tuple[int, int], str]:
    """Return the samples by turn and position."""
    pairs = ((batch, number) for batch in step for number in range(len(batch.keys)))
    return {(batch.turn, batch.positions[number]): batch.keys[number] for batch, number in pairs}


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 2), (2, 4), (4, 1)])
def test_any_world_and_any_start_see_the_same_samples(data: Data, world: int, micro_batch: int) -> None:
    whole = [samples_of(step) for step in take(iter(make_loader(data, [tuple(range(GLOBAL))])), 12)]
    found: list[dict[tuple[int, int], str]] = [{} for _ in range(9)]
    for rank in range(world):
        positions = local_positions(GLOBAL, micro_batch, world, rank)
        with closing(make_loader(data, positions, start=3, workers=2)) as source:
            for steps, step in zip(found, take(iter(source), 9), strict=True):
                assert len({tuple(batch.latents.shape[1:]) for batch in step}) == 1
                steps |= samples_of(step)
    assert found == whole[3:]


def test_steps_have_nearly_equal_tokens_and_samples_come_equally_often(data: Data) -> None:
    loader, used, sizes = make_loader(data, [tuple(range(GLOBAL))]), Counter[str](), Counter[tuple[int, ...]]()
    read, places = loader._read, Counter[tuple[int, int]]()

    def counted(bucket: int, position: int, bad: list[BadSampleError]) -> Sample:
        places[bucket, position] += 1
        return read(bucket, position, bad)

    loader._read = counted
    for step in take(iter(loader), 500):
        shape = tuple(step[0].latents.shape[1:])
        sizes[shape] += 1
        tokens = sum(math.prod(batch.latents.shape) for batch in step)
        largest = GLOBAL * math.prod(SHAPES[BIG])
        assert largest / 2 < tokens <= largest
        used.update(key for batch in step for key in batch.keys)
    assert len(used) == 10
    assert set(places.values()) == {1}  # no position of a stream is used twice
    # 4 large clips, 2 wide ones, and 4 pictures, of which a step takes twice as many.
    shares = {SHAPES[BIG]: 4 / 8, SHAPES[WIDE]: 2 / 8, SHAPES[PICTURE]: 2 / 8}
    assert all(sizes[shape] == pytest.approx(500 * share, rel=0.2) for shape, share in shares.items())
    # Within a bucket all come equally often: they are used epoch by epoch.
    for keys in (("a-0", "a-2", "a-5", "b-1"), ("a-1", "a-4"), ("a-3", "b-0", "b-2", "b-3")):
        assert max(used[key] for key in keys) - min(used[key] for key in keys) <= 1


def test_weights_of_several_sets_hold_over_all_buckets(data: Data) -> None:
    parts = split_by_size(open_training(data.model_copy(update={"weights": (1.0, 3.0)})), data.sizes)
    total = sum(part.share * part.turns for part in parts)
    second = 0.0
    for part in parts:
        weights = part.shards.weights or (1.0,)
        mine = sum(w for w, one in zip(weights, part.shards.sets, strict=True) if one.location == data.locations[1])
        second += part.share * part.turns * mine / sum(weights)
    assert second / total == pytest.approx(3 / 4)


def test_one_size_of_several_trains_as_if_alone(data: Data, tmp_path: Path) -> None:
    alone = data.model_copy(update={"shards": str(tmp_path / "a"), "buckets": (), "height": 16, "width": 48})
    shards = ShardSet.open(str(tmp_path / "a")).of_size(WIDE)
    assert shards.shard_sizes == (1, 1)
    order = SampleOrder(5, (1, 1))
    keys = [key for (batch,) in take(iter(make_loader(alone, [tuple(range(GLOBAL))])), 4) for key in batch.keys]
    assert keys == [shards.key(order.index(position)) for position in range(4 * GLOBAL)]


def test_sizes_that_shards_lack_are_refused(data: Data, tmp_path: Path) -> None:
    shards = open_training(data.model_copy(update={"shards": str(tmp_path / "b")}))
    with pytest.raises(UserError, match=r"data.buckets: 5x16x48: .* holds no clip of this size"):
        split_by_size(shards, data.sizes)
    manifest: Manifest = shards.manifests[0]
    architecture = RunConfig.model_validate(settings(tmp_path)).student.architecture
    architecture = architecture.model_copy(update={"in_channels": 3, "text_dim": TEXT_DIM})
    check_compatible(manifest, data, architecture, None)
    other: dict[str, Any] = {"buckets": (), "height": 48}
    with pytest.raises(UserError, match="5x32x32; 5x16x48; 1x32x32, but this run needs 5x48x32"):
        check_compatible(manifest, data.model_copy(update=other), architecture, None)
    with pytest.raises(UserError, match=r"evaluation.held_out are .*; set data.frames, ... to one of them"):
        check_compatible(manifest, data.model_copy(update={"height": 48}), architecture, None, "evaluation.held_out")


def test_a_folder_opens_at_its_first_bucket_with_samples(data: Data, tmp_path: Path) -> None:
    shards = ShardSet.open(write(tmp_path / "c", [[WIDE, WIDE]]))
    assert (len(shards), shards.manifest.latent_shape) == (2, SHAPES[WIDE])
    # Training clips are compared with held-out ones of their size, whatever the order of the buckets.
    training = nearest.open_training(str(tmp_path / "a"), shards)
    assert [training.read(index).key for index in range(len(training))] == ["a-1", "a-4"]


def test_check_finds_buckets_without_clips_and_counts_clips_without_a_bucket(data: Data, tmp_path: Path) -> None:
    def found(**changes: object) -> list[str]:
        config = RunConfig.model_validate(settings(tmp_path, student__init=None))
        architecture = config.student.architecture.model_copy(update={"in_channels": 3, "text_dim": TEXT_DIM})
        student = config.student.model_copy(update={"architecture": architecture})
        changed = {"data": data.model_copy(update=changes), "student": student}
        files = check_files(config.model_copy(update=changed))
        return [str(one) for one in (*files.errors, *files.warnings) if one.where in ("data.buckets", "data.shards")]

    assert found() == []
    alone = str(tmp_path / "b")
    (missing,) = found(shards=alone)
    assert "data.shards holds no clips of 5x16x48, only of 5x32x32, 1x32x32; remove the others" in missing
    (unset,) = found(shards=alone, buckets=(), height=16, width=48)
    assert "; set it to some of these, or add shards that do" in unset
    (unused,) = found(buckets=(BIG, PICTURE))
    assert "2 of 10 samples are not used, as their sizes are not in data.buckets: 2 of 5x16x48" in unused
    assert "6 of 10 samples are not used" in found(buckets=())[0]
    _, lacking = found(buckets=(), height=48)
    assert lacking.startswith(f"data.shards: {alone}: the sizes of data.shards are 5x32x32; 5x16x48; 1x32x32, but")
