import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from anyflow_train.config.commands import PrepareConfig
from anyflow_train.config.network import Architecture
from anyflow_train.config.run import Data
from anyflow_train.data.held_out import load_samples
from anyflow_train.data.manifest import check_compatible
from anyflow_train.data.prepare.command import run
from anyflow_train.data.prepare.video import read_clip
from anyflow_train.data.shards import ShardSet
from anyflow_train.errors import UserError
from anyflow_train.models.codec import Codec
from anyflow_train.tiny.clips import write_clips
from tests.data.prepare import crews
from tests.data.prepare.videos import hold, real_clip, write_video

SETTINGS = {
    "frames": 5,
    "height": 32,
    "width": 32,
    "samples_per_shard": 3,
    "batch": 2,
    "precision": "fp32",
    "threads": 1,
}


@pytest.fixture(scope="module")
def codec() -> str:
    return str(Path(__file__).resolve().parents[3] / "assets" / "tiny-wan")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, 8, seed=3)
    return folder


@pytest.fixture(scope="module")
def prepared(codec: str, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    run(make_config(codec, clips, out, negative_prompt="red ball", validation_prompts=("wide", "blue square")))
    return out


def make_config(codec: str, source: Path | None, out: Path, **changes: object) -> PrepareConfig:
    places = {"codec": codec, "source": source and str(source), "out": str(out)}
    return PrepareConfig.model_validate({**places, **SETTINGS, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_samples_are_the_encoded_clips(prepared: Path, codec: str, clips: Path) -> None:
    shards, reference = ShardSet.open(str(prepared)), Codec.load(codec, "cpu", torch.float32)
    assert shards.shard_sizes == (3, 3, 2)
    held_out = load_samples(shards, 8)
    assert held_out.keys == [f"{number:05d}" for number in range(8)]
    for number in range(8):
        clip = read_clip(clips / f"{number:05d}.mp4", 5, 32, 32, 16.0)
        # One clip at a time against two at a time: only the order of sums differs.
        assert torch.allclose(held_out.latents[number], reference.encode_video(clip[None])[0], atol=1e-4)
        caption = (clips / f"{number:05d}.txt").read_text().strip()
        assert held_out.captions[number] == caption
        assert torch.allclose(held_out.texts[number], reference.encode_text([caption])[0], atol=1e-5)


def test_the_manifest_says_what_the_shards_are(prepared: Path, codec: str) -> None:
    shards, reference = ShardSet.open(str(prepared)), Codec.load(codec, "cpu", torch.float32)
    manifest = shards.manifest
    assert manifest.latent_shape == (2, 16, 4, 4)
    assert (manifest.frames, manifest.height, manifest.width, manifest.fps) == (5, 32, 32, 16.0)
    assert (manifest.clips, manifest.skipped, manifest.samples) == (8, 0, 8)
    indices = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(prepared.glob("*.index.json"))]
    assert [shard.index_sha256 for shard in manifest.shards] == indices
    assert manifest.codec.latents_mean == reference.latents_mean
    assert manifest.longest_text == max(len(text) for text in load_samples(shards, 8).texts)
    expected = reference.encode_text(["red ball", "wide", "blue square"])
    found = [shards.texts.negative, *shards.texts.validation]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    data = Data(shards=str(prepared), frames=5, height=32, width=32)
    check_compatible(manifest, data, Architecture(text_dim=manifest.text_dim), manifest.codec.vae)


def test_a_tilde_is_the_home_folder(
    prepared: Path, codec: str, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, place in (("clips", clips), ("codec", Path(codec))):
        (tmp_path / name).symlink_to(place.resolve())
    monkeypatch.setenv("HOME", str(tmp_path))
    prompts = {"negative_prompt": "red ball", "validation_prompts": ("wide", "blue square")}
    run(make_config("~/codec", Path("~/clips"), Path("~/out"), **prompts))
    assert len(ShardSet.open("~/out")) == 8
    for name, data in contents(prepared).items():
        assert name == "manifest.json" or contents(tmp_path / "out")[name] == data


def test_a_second_run_does_nothing(prepared: Path, codec: str, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(prepared)
    run(make_config(codec, clips, prepared, negative_prompt="red ball", validation_prompts=("wide", "blue square")))
    assert "is complete: 8 samples in 3 shards" in capsys.readouterr().out
    assert contents(prepared) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 9}, "frames: was 5 and is now 9 since"),
        ({"latent_dtype": "bf16"}, "latent_dtype: was 'fp32' and is now 'bf16'"),
        ({"samples_per_shard": 4}, "samples_per_shard: was 3 and is now 4"),
    ],
)
def test_changed_settings_are_refused_by_name(
    prepared: Path, codec: str, clips: Path, change: dict, message: str
) -> None:
    settings = {"negative_prompt": "red ball", "validation_prompts": ("wide", "blue square")} | change
    before = contents(prepared)
    with pytest.raises(UserError) as caught:
        run(make_config(codec, clips, prepared, **settings))
    assert str(caught.value).startswith(message)
    assert contents(prepared) == before


def test_a_foreign_folder_is_refused(codec: str, clips: Path) -> None:
    with pytest.raises(UserError, match=r"out: .* holds other files"):
        run(make_config(codec, clips, clips))


def test_a_failed_first_start_refuses_nothing(codec: str, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is neither a folder nor a hub id"):
        run(make_config(str(tmp_path / "typo"), clips, tmp_path / "out"))
    run(make_config(codec, clips, tmp_path / "out"))


def test_unusable_clips_are_skipped_named_and_counted(codec: str, tmp_path: Path, capsys) -> None:
    source = tmp_path / "clips"
    source.mkdir()
    for name in ("a", "c", "e", "f"):
        write_video(source / f"{name}.mp4", range(0, 100, 10))
    write_video(source / "b.mp4", [1, 2])
    (source / "d.mp4").write_bytes(b"this is not a video")
    for name in "abcde":
        (source / f"{name}.txt").write_text("a red ball")
    (source / "e.txt").write_text(" \n")
    run(make_config(codec, source, tmp_path / "out"))
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    reasons = {entry["key"]: entry["reason"].partition(":")[0] for entry in skipped}
    assert reasons == {"b": "too short", "d": "unreadable", "e": "empty caption", "f": "empty caption"}
    shards = ShardSet.open(str(tmp_path / "out"))
    assert load_samples(shards, 2).keys == ["a", "c"]
    assert (shards.manifest.clips, shards.manifest.skipped) == (6, 4)
    output = capsys.readouterr().out
    assert "2 samples in 2 shards from 6 clips; 4 skipped" in output
    assert "2 empty caption" in output


def test_nothing_usable_is_an_error_with_the_reasons(codec: str, tmp_path: Path) -> None:
    source = tmp_path / "clips"
    source.mkdir()
    write_video(source / "a.mp4", [1])
    (source / "a.txt").write_text("wide")
    with pytest.raises(UserError, match=r"no clip could be used: 1 too short; .*skipped.jsonl"):
        run(make_config(codec, source, tmp_path / "out"))
    # Nothing is encoded, so that neither other settings nor better clips need another folder.
    with pytest.raises(UserError, match="no clip could be used"):
        run(make_config(codec, source, tmp_path / "out", min_size=1000))
    write_video(source / "a.mp4", [1] * 20)
    run(make_config(codec, source, tmp_path / "out"))
    assert len(ShardSet.open(str(tmp_path / "out"))) == 1


def test_prompts_need_no_video(codec: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball\na blue square\n")
    config = make_config(codec, None, tmp_path / "out", prompts=str(tmp_path / "prompts.txt"))
    run(config)
    shards = ShardSet.open(str(tmp_path / "out"))
    assert shards.manifest.kind == "prompts"
    assert [shards.read(index).caption for index in range(2)] == ["a red ball", "a blue square"]
    assert shards.read(0).latents is None
    run(config)


def test_latents_may_be_stored_in_half_the_space(prepared: Path, codec: str, clips: Path, tmp_path: Path) -> None:
    run(make_config(codec, clips, tmp_path / "out", latent_dtype="bf16"))
    exact, rounded = (load_samples(ShardSet.open(str(folder)), 8).latents for folder in (prepared, tmp_path / "out"))
    assert torch.equal(exact.bfloat16().float(), rounded)


def test_real_clips_are_prepared(codec: str, tmp_path: Path) -> None:
    names = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
    rows = [{"video": str(real_clip(name)), "key": name, "caption": "a red ball"} for name in names]
    (tmp_path / "clips.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run(make_config(codec, tmp_path / "clips.jsonl", tmp_path / "out", frames=9, height=48, width=80))
    held_out = load_samples(ShardSet.open(str(tmp_path / "out")), 3)
    assert held_out.latents.shape == (3, 3, 16, 6, 10)
    assert held_out.keys == ["bikes_mp4", "bigbuckbunny_mp4", "carphone_pristine_mp4"]


def release(pipe: Path) -> None:
    """Let a process that waits to read a named pipe see its end."""
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:  # no process waits
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_job_continues_to_the_same_bytes(
    codec: str, clips: Path, tmp_path: Path, number: signal.Signals
) -> None:
    source, out = tmp_path / "clips", tmp_path / "out"
    shutil.copytree(clips, source)
    # The last clip of the second shard cannot be read, so the job waits there forever.
    fifo = hold(source / "00005.mp4")
    config = make_config(codec, source, out, threads=1)
    job = crews.begin(crews.prepare_interruptibly, config)
    while not (out / "shard-000000.index.json").exists():
        assert job.is_alive()
        time.sleep(0.01)
    os.kill(job.pid or 0, number)
    while job.is_alive():  # after SIGINT the job still waits for clips that are being read: end them
        release(fifo)
    assert job.exitcode == (-number if number == signal.SIGKILL else 1)
    first = (out / "shard-000000.tar").read_bytes(), (out / "shard-000000.tar").stat().st_mtime_ns
    assert not (out / "shard-000002.tar").exists()
    assert not (out / "manifest.json").exists()
    with pytest.raises(UserError, match=r"manifest.json"):
        ShardSet.open(str(out))
    fifo.unlink()
    run(config)
    assert first == ((out / "shard-000000.tar").read_bytes(), (out / "shard-000000.tar").stat().st_mtime_ns)
    run(make_config(codec, clips, tmp_path / "undisturbed"))
    left, right = contents(out), contents(tmp_path / "undisturbed")
    assert left.keys() == right.keys()
    assert {name for name in left if left[name] != right[name]} == set()
    assert [path.name for path in out.iterdir() if path.name.startswith(".") and path.name != ".lock"] == []
