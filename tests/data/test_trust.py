"""Shards of others: what their files say must not run, read or write anything outside of the folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from anyflow_train.data.remote import public_location
from anyflow_train.data.shards import BadSampleError, ShardSet
from anyflow_train.errors import UserError
from anyflow_train.files import atomic_file, inside, parse_json
from tests.data.helpers import make_shards


def edit(folder: Path, name: str, before: str, after: str) -> None:
    text = (folder / name).read_text()
    assert before in text
    (folder / name).write_text(text.replace(before, after))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "shards", [2])


@pytest.mark.parametrize(
    "name",
    ["../out.tar", "/etc/passwd", "a/b.tar", "..", ".hidden", "-rf", "x; touch PWNED #", "$(touch PWNED)", "", "é"],
)
def test_a_shard_is_named_by_a_plain_file_name(folder: Path, name: str) -> None:
    edit(folder, "manifest.json", '"shard-000000.tar"', json.dumps(name))
    with pytest.raises(UserError, match=r"manifest.json: shards.0.name"):
        ShardSet.open(str(folder))


def test_a_pipe_runs_only_what_the_user_typed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shards = ShardSet.open(f"pipe:cat {folder}/{{}}", str(tmp_path / "cache"))
    with pytest.raises(OSError, match="exit code 1"):
        shards.folder.read_bytes("x; touch PWNED #")
    assert not Path("PWNED").exists()


@pytest.mark.parametrize("name", ["manifest.json", "text.safetensors", "shard-000000.tar"])
def test_a_link_that_leaves_the_folder_is_not_followed(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises((UserError, BadSampleError), match="leads out of its folder"):
        ShardSet.open(str(folder)).read(0)


def test_links_within_the_folder_and_into_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "datasets--me--clips" / "snapshots" / "abc", tmp_path / "datasets--me--clips" / "blobs"
    folder = make_shards(snapshot / "train", [2])
    blobs.mkdir()
    (folder / "shard-000000.tar").rename(blobs / "0123")
    (folder / "shard-000000.tar").symlink_to(os.path.relpath(blobs / "0123", folder))
    assert ShardSet.open(str(folder)).read(0).key == "clip-000"
    (folder / "manifest.json").rename(folder / "other")
    (folder / "manifest.json").symlink_to("other")
    link = tmp_path / "short"
    link.symlink_to(folder)  # the folder itself is named by the user
    assert ShardSet.open(str(link)).read(1).key == "clip-001"
    with pytest.raises(OSError, match="leads out"):
        inside(folder, "../abc2")


@pytest.mark.parametrize("name", ["manifest.json", "text.safetensors", "shard-000000.index.json", "shard-000000.tar"])
def test_a_fifo_is_not_opened(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    try:
        assert ShardSet.open(str(folder)).read(0).key == "clip-000"
        assert name == "shard-000000.index.json"  # it is made again
    except (UserError, BadSampleError) as error:
        assert "is not a regular file" in str(error)  # noqa: PT017 (or no error, see above)


def test_an_index_is_not_written_through_a_link(folder: Path, tmp_path: Path) -> None:
    index = folder / "shard-000000.index.json"
    index.unlink()
    index.symlink_to(tmp_path / "outside")
    assert ShardSet.open(str(folder)).read(0).key == "clip-000"
    (folder / f".tmp-{index.name}").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="symbolic links"), atomic_file(index) as file:
        file.write(b"x")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    ("place", "value"), [(1, 10**18), (2, 10**18), (4, 10**18), (5, 10**18), (1, -1), (2, -1), (1, "x"), (0, 1)]
)
def test_offsets_are_compared_with_the_size_of_the_file(folder: Path, place: int, value: object) -> None:
    path = folder / "shard-000000.index.json"
    content = json.loads(path.read_text())
    content["entries"][0][place] = value
    path.write_text(json.dumps(content))
    shards = ShardSet.open(str(folder))
    if value == 10**18:
        with pytest.raises(BadSampleError, match="the file ends before it"):
            shards.read(0)
    else:  # not an index: it is made again
        assert shards.read(0).key == "clip-000"


@pytest.mark.parametrize("value", ["NaN", "null", "[]", '"a"', "{}", "-1", "1e99"])
@pytest.mark.parametrize("key", ["shards", "text_dim", "latent_shape", "codec", "validation_prompts"])
def test_a_wrong_type_in_the_manifest_is_one_sentence(folder: Path, key: str, value: str) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text()) | {key: "PLACE"}
    path.write_text(json.dumps(content).replace('"PLACE"', value))
    try:
        ShardSet.open(str(folder)).read(0)
    except (UserError, BadSampleError) as error:
        assert "\n" not in str(error)  # noqa: PT017 (no error: the value happens to be right)


@pytest.mark.parametrize("data", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000])
def test_deep_or_long_json_is_a_value_error(data: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_json(data)


def test_numbers_of_another_type_are_a_bad_sample(folder: Path) -> None:
    for dtype in (torch.int64, torch.float8_e4m3fn, torch.complex64):
        text = torch.zeros(2, 6, dtype=dtype)
        data = save({"text": text, "latents": torch.zeros(2, 3, 4, 4)})
        index = {
            "version": 1,
            "longest_text": 5,
            "skipped": [],
            "entries": [["a\x1b[2J", 0, len(data), None, 0, 0]] * 2,
        }
        (folder / "shard-000000.tar").write_bytes(data)
        (folder / "shard-000000.index.json").write_text(json.dumps(index))
        with pytest.raises(BadSampleError, match="contains numbers of type") as caught:
            ShardSet.open(str(folder)).read(0)
        assert r"a\x1b[2J" in str(caught.value)


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("/data/a@b?c", "/data/a@b?c"),
        ("s3://bucket/shards", "s3://bucket/shards"),
        ("https://me:secret@host:80/a/{}?sig=secret#x", "https://host:80/a/{}"),
        ("pipe:curl -H 'Authorization: secret' https://host/{}", "pipe:curl ..."),
    ],
)
def test_secrets_of_a_location_are_not_shown(location: str, shown: str) -> None:
    assert public_location(location) == shown
    if "secret" in location:
        with pytest.raises(UserError, match=r"cannot read manifest.json") as caught:
            ShardSet.open(location.replace("host:80", "127.0.0.1:9").replace("https://host", "http://127.0.0.1:9"))
        assert "secret" not in str(caught.value)


def test_control_characters_in_errors_are_escaped() -> None:
    error = UserError("a\nerror: b", "c\x1b[2J\u202e \ud83d é")
    assert str(error) == r"a\nerror: b: c\x1b[2J\u202e \ud83d é"
