"""Windows of a clip and their sizes: several samples from one file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.stream import VideoStream
from PIL import Image

from anyflow_train.config.base import ClipSize
from anyflow_train.config.commands import PrepareConfig
from anyflow_train.data.manifest import MANIFEST
from anyflow_train.data.prepare import command
from anyflow_train.data.prepare.command import run
from anyflow_train.data.prepare.video import ClipError, read_clip, read_windows
from anyflow_train.data.prepare.windows import Framing, Limits
from anyflow_train.data.shards import ShardSet
from anyflow_train.errors import UserError
from tests.data.prepare.videos import write_video

CODEC = str(Path(__file__).resolve().parents[3] / "assets" / "tiny-wan")
SMALL = ClipSize(5, 16, 16)


def starts(windows: str, length: int, key: str = "a", frames: int = 5) -> list[int]:
    return list(Framing((SMALL,), 8.0, windows).starts(key, frames, length))


def test_windows_are_spread_over_the_clip() -> None:
    assert starts("first", 40) == [0]
    for length in (20, 23, 24):  # whole windows one after the other, with the rest before and after them
        found = starts("all", length)
        assert [b - a for a, b in itertools.pairwise(found)] == [5] * 3
        assert 0 <= found[0] <= length - 20
    for count in (1, 3, 8):
        found = starts(str(count), 40)
        assert len(found) == count
        assert all(place * 36 // count <= start < (place + 1) * 36 / count for place, start in enumerate(found))
    assert starts("8", 7) == [0, 1, 2]  # no two equal ones
    found = starts("2s", 40)
    assert [b - a for a, b in itertools.pairwise(found)] == [16] * 2
    # Another clip has another offset, whatever else is in the list.
    assert len({tuple(starts("3", 4000, key)) for key in "abcdef"}) == 6
    assert starts("3", 4000, "a") == starts("3", 4000, "a")


@pytest.mark.parametrize("windows", ["all", "3", "0.25s"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])  # mkv does not state the duration of its pictures
def test_a_window_is_the_clip_that_begins_there(tmp_path: Path, windows: str, suffix: str) -> None:
    greys = [5 * number for number in range(33)]
    clip = write_video(tmp_path / f"clip.{suffix}", greys, 8, (16, 16))
    found = dict(read_windows(clip, "clip", Framing((SMALL,), 8.0, windows)))
    places = starts(windows, 33, "clip")
    assert list(found) == [f"clip@w{number:02d}" for number in range(len(places))]
    assert len(places) > 2
    for start, pixels in zip(places, found.values(), strict=True):
        assert pixels.shape == (3, 5, 16, 16)
        wanted = torch.tensor(greys[start : start + 5]) / 127.5 - 1
        torch.testing.assert_close(pixels.mean(dim=(0, 2, 3)), wanted, atol=0.03, rtol=0)


def test_windows_of_a_file_that_was_cut_off_are_spread_over_what_is_left(tmp_path: Path) -> None:
    path, noise = tmp_path / "clip.mp4", np.random.default_rng(0)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as file:  # states 8 s before the pictures
        stream = file.add_stream("libx264", rate=8, width=96, height=96, pix_fmt="yuv420p")
        assert isinstance(stream, VideoStream)
        for _ in range(64):
            picture = noise.integers(0, 256, (96, 96, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        file.mux(stream.encode())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    windows = read_windows(path, "clip", Framing((SMALL,), 8.0, "4"))
    assert [next(windows)[0] for _ in range(3)] == ["clip@w00", "clip@w01", "clip@w02"]
    with pytest.raises(ClipError, match=r"^ends early: at 3.\d\d s, before the end of window 3$"):
        next(windows)
    # Without windows, the longest size that the rest has room for is taken.
    sizes = (ClipSize(61, 16, 16), ClipSize(21, 16, 16))
    ((_, pixels),) = read_windows(path, "clip", Framing(sizes, 8.0))
    assert pixels.shape[1] == 21


def test_the_size_that_crops_the_least_is_chosen() -> None:
    square, wide, tall = ClipSize(17, 64, 64), ClipSize(17, 48, 80), ClipSize(17, 80, 48)
    framing = Framing((square, wide, tall, ClipSize(9, 64, 64), ClipSize(1, 64, 64), ClipSize(1, 32, 64)), 16.0)
    for height, width, length, wanted in (
        (64, 64, 17, "17x64x64"),  # equal crops: the most frames
        (64, 64, 16, "9x64x64"),
        (1080, 1920, 90, "17x48x80"),
        (1920, 1080, 90, "17x80x48"),
        (1920, 1080, 9, "9x64x64"),
        (32, 64, 17, "17x48x80"),  # a video never becomes a picture
    ):
        assert str(framing.size(height, width, length, is_picture=False)) == wanted
    assert str(framing.size(50, 100, 1, is_picture=True)) == "1x32x64"
    with pytest.raises(ClipError, match=r"too short: it lasts 0.50 s, but 9 frames at 16 fps need more than 0.50 s"):
        framing.size(64, 64, 8, is_picture=False)
    both = (ClipSize(5, 64, 64), ClipSize(5, 32, 32))
    assert str(Framing(both, 16.0).size(40, 40, 9, False)) == "5x64x64"
    assert str(Framing(both, 16.0, limits=Limits(upscale=1.0)).size(40, 40, 9, False)) == "5x32x32"


def prepare(folder: Path, **changes: object) -> ShardSet:
    places = {"codec": CODEC, "source": str(folder / "clips"), "out": str(folder / "out")}
    sizes = {"buckets": ["5x32x32", "5x32x48", "1x32x32"], "windows": "2", "fps": 8.0}
    settings = {"batch": 3, "precision": "fp32", "threads": 1, "samples_per_shard": 3}
    run(PrepareConfig.model_validate({**places, **sizes, **settings, **changes}))
    return ShardSet.open(str(folder / "out"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    clips = tmp_path / "clips"
    clips.mkdir()
    write_video(clips / "a.mp4", [9 * number for number in range(12)], 8, (32, 32))
    write_video(clips / "b.mp4", [50] * 7, 8, (32, 48))
    Image.new("RGB", (48, 48), (255, 0, 0)).save(clips / "c.png")
    Image.new("RGB", (48, 48)).save(clips / "b.jpg")  # a preview of the video
    for name in "abc":
        (clips / f"{name}.txt").write_text(f"caption {name}")
    return tmp_path


def test_prepare_cuts_windows_into_buckets_and_grows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = prepare(folder)
    text = "5 samples in 1 shards from 3 clips (2 5x32x32, 2 5x32x48, 1 1x32x32); 1 not used (1 .jpg)"
    assert text in capsys.readouterr().out
    every = shards.of_all_sizes()
    keys = [every.key(index) for index in range(5)]
    assert keys == ["a@w00", "a@w01", "b@w00", "b@w01", "c@w00"]
    wide = shards.of_size(ClipSize(5, 32, 48))
    assert [wide.read(index).key for index in range(len(wide))] == keys[2:4]
    assert wide.manifest.latent_shape == (2, 16, 4, 6)
    latents = [every.read(index).latents for index in range(5)]
    assert [tuple(one.shape[::2]) for one in latents if one is not None] == [(2, 4)] * 4 + [(1, 4)]
    assert {every.read(index).caption for index in range(4)} == {"caption a", "caption b"}
    before = contents(folder / "out")
    prepare(folder)
    assert contents(folder / "out") == before

    # All windows of a changed clip are replaced, also if their number changes.
    write_video(folder / "clips" / "a.mp4", [90] * 5, 8, (32, 32))
    shards = prepare(folder).of_all_sizes()
    assert [shards.key(index) for index in range(len(shards))] == ["b@w00", "b@w01", "c@w00", "a@w00"]
    assert [len(shards.of_size(size)) for size in shards.manifest.clip_sizes] == [1, 2, 1]
    bytes_of_b = shards.read(0).latents
    old = ShardSet.open(str(folder / "out"), generation=0).of_all_sizes()
    assert [old.key(index) for index in range(len(old))] == keys
    (folder / "clips" / "c.png").unlink()
    write_video(folder / "clips" / "d.mp4", [1] * 6, 8, (32, 32))
    (folder / "clips" / "d.txt").write_text("d")
    capsys.readouterr()
    pruned = prepare(folder, prune=True).of_all_sizes()
    assert "texts: 2/2 clips" in capsys.readouterr().err  # d is encoded, and b is copied
    assert sorted(pruned.key(index) for index in range(len(pruned))) == ["a@w00", "b@w00", "b@w01", "d@w00", "d@w01"]
    assert [len(pruned.of_size(size)) for size in pruned.manifest.clip_sizes] == [3, 2, 0]
    place = next(index for index in range(5) if pruned.key(index) == "b@w00")
    assert torch.equal(pruned.read(place).latents, bytes_of_b)  # pyright: ignore[reportArgumentType] (video)


def test_windows_before_damage_stay_and_the_rest_is_listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(source: Path, key: str, framing: Framing) -> Iterator[tuple[str, Any]]:
        windows = read_windows(source, key, framing)
        yield next(windows)
        if key == "a":
            raise ClipError("damaged: the picture at 0.75 s cannot be decoded without errors")
        yield from windows

    monkeypatch.setattr(command, "read_windows", damaged)
    shards = prepare(folder, batch=1).of_all_sizes()
    assert [shards.key(index) for index in range(len(shards))] == ["a@w00", "b@w00", "b@w01", "c@w00"]
    assert "; 1 clips lost windows (1 damaged; for example a@w01)" in capsys.readouterr().out
    (line,) = (folder / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "a@w01"
    assert (shards.manifest.clips, shards.manifest.skipped) == (3, 0)


def test_a_folder_of_one_size_has_nothing_new(folder: Path) -> None:
    (folder / "clips" / "c.png").unlink()
    plain = prepare(folder, buckets=(), windows="first", frames=5, height=32, width=32)
    assert [plain.key(index) for index in range(2)] == ["a", "b"]
    written = (folder / "out" / MANIFEST).read_text() + (folder / "out" / "shard-000000.index.json").read_text()
    assert "buckets" not in written
    assert not {"buckets", "windows"} & json.loads((folder / "out" / "prepare.json").read_text()).keys()
    sample = plain.read(0)
    assert sample.latents is not None
    assert sample.latents.shape == (2, 16, 4, 4)
    assert read_clip(folder / "clips" / "a.mp4", 5, 32, 32, 8.0).shape == (3, 5, 32, 32)


def test_clips_are_counted_once_if_a_batch_ends_within_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "clips" / "aa.mp4").write_bytes(b"no video")
    prepare(folder, windows="0.125s", samples_per_shard=9)  # 8 windows of "a" in batches of 3
    assert "clips: 4/4 clips, 1 skipped" in capsys.readouterr().err


def test_other_buckets_are_refused_as_users_write_them(folder: Path) -> None:
    prepare(folder)
    with pytest.raises(UserError, match=r"buckets: was \[5x32x32, 5x32x48, 1x32x32\] and is now not set"):
        prepare(folder, buckets=())
