import io
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import webdataset
from safetensors.torch import load, save

from anyflow_train.data.held_out import load_samples
from anyflow_train.data.shards import BadSampleError, ShardSet
from anyflow_train.errors import UserError
from tests.data.helpers import make_sample, make_shards
from tests.shards import add_index_checksums


def test_every_sample_comes_back(tmp_path: Path) -> None:
    shards = ShardSet.open(str(make_shards(tmp_path, [3, 0, 2])))
    assert len(shards) == 5
    assert shards.shard_sizes == (3, 0, 2)
    for number in range(5):
        expected, found = make_sample(number), shards.read(number)
        assert (found.key, found.caption) == (expected.key, expected.caption)
        assert torch.equal(found.latents, expected.latents)
        assert torch.equal(found.text, expected.text)


def test_stock_webdataset_reads_the_shards(tmp_path: Path) -> None:
    folder = make_shards(tmp_path, [3])
    found = list(webdataset.WebDataset(str(folder / "shard-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == ["clip-000", "clip-001", "clip-002"]
    assert torch.equal(load(found[2]["safetensors"])["latents"], make_sample(2).latents)


def test_a_shard_of_stock_webdataset_gets_an_index(tmp_path: Path) -> None:
    folder = make_shards(tmp_path, [2])
    (folder / "shard-000000.index.json").unlink()
    with webdataset.TarWriter(str(folder / "shard-000000.tar")) as writer:
        for number in range(2):
            sample = make_sample(number)
            tensors = save({"latents": sample.latents, "text": sample.text})
            writer.write({"__key__": sample.key, "safetensors": tensors, "txt": sample.caption})
    found = ShardSet.open(str(folder)).read(1)
    assert (found.key, found.caption) == ("clip-001", "caption 1")
    assert torch.equal(found.text, make_sample(1).text)
    assert (folder / "shard-000000.index.json").exists()


def flip_a_byte(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def test_one_flipped_bit_is_noticed_and_named(tmp_path: Path) -> None:
    tar = make_shards(tmp_path, [3]) / "shard-000000.tar"
    shards = ShardSet.open(str(tmp_path))
    with tarfile.open(tar) as archive:
        place = archive.getmember("clip-001.safetensors")
    flip_a_byte(tar, place.offset_data + place.size - 1)
    with pytest.raises(BadSampleError, match=r"shard-000000.tar: clip-001: .*checksum"):
        shards.read(1)
    assert shards.read(0).key == "clip-000"
    assert shards.read(2).key == "clip-002"


@pytest.mark.parametrize("indexed", [True, False])
def test_a_truncated_tar_loses_only_its_end(tmp_path: Path, indexed: bool) -> None:
    tar = make_shards(tmp_path, [4]) / "shard-000000.tar"
    with tarfile.open(tar) as archive:
        cut = archive.getmember("clip-002.safetensors").offset_data + 10
    tar.write_bytes(tar.read_bytes()[:cut])
    if not indexed:
        (tmp_path / "shard-000000.index.json").unlink()
    shards = ShardSet.open(str(tmp_path))
    assert [shards.read(i).key for i in (0, 1)] == ["clip-000", "clip-001"]
    for index in (2, 3):
        with pytest.raises(BadSampleError, match="ends before it"):
            shards.read(index)


@pytest.mark.parametrize("checked", [True, False])
def test_a_shard_of_another_folder_is_a_bad_sample(tmp_path: Path, checked: bool) -> None:
    """A manifest with the checksums of the indices notices it; that of an older version cannot."""
    folder, other = make_shards(tmp_path / "a", [2, 2]), make_shards(tmp_path / "b", [1, 2, 1])
    if checked:
        add_index_checksums(folder)
    for name in ("shard-000001.tar", "shard-000001.index.json"):  # clips 1 and 2 instead of 2 and 3
        shutil.copy(other / name, folder / name)
    shards = ShardSet.open(str(folder))
    assert shards.read(1).key == "clip-001"
    if checked:
        with pytest.raises(BadSampleError, match=r"shard-000001\.tar: .* not the one that the manifest"):
            shards.read(2)
    else:
        assert shards.read(2).key == "clip-001"


def test_an_index_without_checksums_does_not_take_the_place_of_one_with_them(tmp_path: Path) -> None:
    folder = add_index_checksums(make_shards(tmp_path, [2]))
    (folder / "shard-000000.index.json").unlink()
    assert ShardSet.open(str(folder)).read(1).key == "clip-001"
    assert not (folder / "shard-000000.index.json").exists()


def test_a_missing_shard_is_a_bad_sample(tmp_path: Path) -> None:
    (make_shards(tmp_path, [2, 2]) / "shard-000001.tar").unlink()
    with pytest.raises(BadSampleError, match=r"shard-000001.tar: clip-002"):
        ShardSet.open(str(tmp_path)).read(2)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"text": torch.zeros(2, 6)}, "the latents are missing"),
        ({"text": torch.zeros(2, 7), "latents": torch.zeros(2, 3, 4, 4)}, "the text is"),
        ({"text": torch.zeros(2, 6), "latents": torch.zeros(2, 3, 4, 5)}, "the latents are"),
        ({"text": torch.zeros(2, 6), "latents": torch.full((2, 3, 4, 4), torch.nan)}, "non-finite"),
    ],
)
def test_a_sample_that_is_not_what_the_manifest_says_is_bad(tmp_path: Path, tensors: dict, reason: str) -> None:
    folder = make_shards(tmp_path, [1])
    (folder / "shard-000000.index.json").unlink()
    data = save(tensors)
    with tarfile.open(folder / "shard-000000.tar", "w") as archive:
        info = tarfile.TarInfo("clip.safetensors")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    with pytest.raises(BadSampleError, match=reason):
        ShardSet.open(str(folder)).read(0)


@pytest.mark.parametrize("name", ["manifest.json", "text.safetensors"])
def test_an_unfinished_folder_is_refused(tmp_path: Path, name: str) -> None:
    (make_shards(tmp_path, [1]) / name).unlink()
    with pytest.raises(UserError, match=name):
        ShardSet.open(str(tmp_path))


def test_held_out_samples_leave_out_bad_ones(tmp_path: Path) -> None:
    tar = make_shards(tmp_path, [4]) / "shard-000000.tar"
    flip_a_byte(tar, 700)
    held_out = load_samples(ShardSet.open(str(tmp_path)), 3)
    assert held_out.keys == ["clip-001", "clip-002", "clip-003"]
    assert held_out.captions[0] == "caption 1"
    assert held_out.latents.shape == (3, 2, 3, 4, 4)
    assert [len(text) for text in held_out.texts] == [2, 3, 4]
    with pytest.raises(UserError, match="holds 3 good samples of 4; lower held_out_samples"):
        load_samples(ShardSet.open(str(tmp_path)), 4)
