"""Distances to the nearest training clip."""

from pathlib import Path

import pytest
import torch

from anyflow_train.data.manifest import CodecInfo, write_manifest
from anyflow_train.data.shards import ShardSet
from anyflow_train.errors import UserError
from anyflow_train.evaluation import nearest
from anyflow_train.evaluation.intervals import resample, single_stratum
from anyflow_train.evaluation.nearest import nearest_distances, open_training, summarise
from tests.data.helpers import SHAPE, make_shards

NUMBERS = 2 * 3 * 4 * 4  # of SHAPE; clip k is full of the number k


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Clips 0 to 6 in two shards."""
    return ShardSet.open(str(make_shards(tmp_path_factory.mktemp("nearest") / "training", (4, 3))))


def test_distances_are_to_the_nearest_of_all_clips(training: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "BLOCK", 3)  # blocks of 3, 3 and 1
    values = torch.tensor([1.25, 3.5, 6.0, 9.0])
    samples = values.view(-1, 1, 1, 1, 1).expand(-1, *SHAPE)
    of_samples, of_last = nearest_distances(training, [samples, samples[-1:]])
    expected = torch.tensor([0.25, 0.5, 0.0, 3.0], dtype=torch.float64) * NUMBERS**0.5
    # The Gram form leaves 1e-8 of the spread, about 40, where the distance is zero.
    torch.testing.assert_close(of_samples, expected, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(of_last, expected[-1:], rtol=1e-9, atol=0)


def test_an_unreadable_clip_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_shards(tmp_path / "training", (3,))
    shard = folder / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[content.index(torch.tensor([2.0, 2.0]).numpy().tobytes())] ^= 1  # a flipped bit in the last clip
    shard.write_bytes(content)
    (distances,) = nearest_distances(ShardSet.open(str(folder)), [torch.full((1, *SHAPE), 2.0)])
    assert float(distances[0]) == pytest.approx(NUMBERS**0.5)
    assert "clip-002" in caplog.text


def test_shards_without_a_readable_clip_are_refused(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "training", (2,))
    (folder / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="no readable clip"):
        nearest_distances(ShardSet.open(str(folder)), [torch.zeros(1, *SHAPE)])


def test_summary_of_known_distances() -> None:
    distances = torch.arange(1000, dtype=torch.float64).flip(0) + 1
    found = summarise(distances, resample(single_stratum(1000), 400, seed=0))
    assert found.mean.value == pytest.approx(500.5)
    assert found.percentile_1.value == pytest.approx(10, abs=1)  # a sum of weights of 1 % may round to either side
    assert found.minimum == 1
    # 1.96 standard errors of 1000 uniform numbers are 1000 / sqrt(12 * 1000) * 1.96 = 17.9; 400 replicates know that
    # to 1 / sqrt(2 * 400) = 4 % and its ends a little worse.
    assert found.mean.high - found.mean.low == pytest.approx(2 * 17.9, rel=0.15)
    # The 10th of 1000 is Poisson-like: 10 +- 1.96 sqrt(10).
    assert found.percentile_1.low == pytest.approx(10 - 6.2, abs=2)
    assert found.percentile_1.high == pytest.approx(10 + 6.2, abs=3)


def test_shards_of_another_size_or_vae_are_refused(training: ShardSet, tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "other", (2,))
    held_out = ShardSet.open(str(folder))
    assert len(open_training(training.location, held_out)) == 7
    changes = {
        "latents": {"latent_shape": (2, 3, 4, 8)},
        "another": {"codec": CodecInfo(source="elsewhere", vae="xyz", text_encoder="def")},
    }
    for word, change in changes.items():
        write_manifest(folder, held_out.manifest.model_copy(update=change))
        with pytest.raises(UserError, match=f"training_shards.*{word}"):
            open_training(training.location, ShardSet.open(str(folder)))


def test_a_vae_known_by_name_only_is_not_held_against_them(training: ShardSet, tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "other", (2,))
    manifest = ShardSet.open(str(folder)).manifest
    named = CodecInfo(source="hub/id", vae="name:hub/id", text_encoder="def")
    write_manifest(folder, manifest.model_copy(update={"codec": named}))
    assert len(open_training(training.location, ShardSet.open(str(folder)))) == 7
