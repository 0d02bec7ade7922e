"""A folder of shards grows with its source, and the result does not depend on when a job was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anyflow_train.config.commands import PrepareConfig
from anyflow_train.data.manifest import MANIFEST
from anyflow_train.data.prepare import command, older
from anyflow_train.data.prepare.command import run
from anyflow_train.data.prepare.job import make_plan
from anyflow_train.data.prepare.ledger import Ledger
from anyflow_train.data.prepare.video import read_windows
from anyflow_train.data.shards import ShardSet
from anyflow_train.errors import UserError
from anyflow_train.tiny.clips import write_clips
from tests.conftest import with_nightly
from tests.data.prepare.crews import changes
from tests.data.prepare.videos import write_video

CODEC = str(Path(__file__).resolve().parents[3] / "assets" / "tiny-wan")
SETTINGS = {"frames": 5, "height": 32, "width": 32, "samples_per_shard": 2, "precision": "fp32", "threads": 1}


def make_config(folder: Path, **changes: Any) -> PrepareConfig:
    places = {"codec": CODEC, "source": str(folder / "clips"), "out": str(folder / "out")}
    return PrepareConfig.model_validate({**places, **SETTINGS, **changes})


def prepare(folder: Path, **changes: Any) -> ShardSet:
    run(make_config(folder, **changes))
    return ShardSet.open(str(folder / "out"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def samples(shards: ShardSet) -> dict[str, str]:
    """Captions by key, in the order of the shards."""
    return {sample.key: sample.caption for sample in map(shards.read, range(len(shards)))}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips, of which one is too short, and their shards."""
    folder = tmp_path_factory.mktemp("begun")
    write_clips(folder / "clips", 3, seed=3)
    write_video(folder / "clips" / "short.mp4", [1, 2])
    (folder / "clips" / "short.txt").write_text("too short")
    prepare(folder)
    return folder


@pytest.fixture
def folder(begun: Path, tmp_path: Path) -> Path:
    """A copy of what has begun."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    return tmp_path


def add(folder: Path) -> None:
    """Add two clips, change a caption, repair the short clip, and remove a clip."""
    write_video(folder / "clips" / "a.mp4", range(0, 80, 10))
    write_video(folder / "clips" / "b.mp4", range(0, 40, 5))
    write_video(folder / "clips" / "short.mp4", range(0, 100, 10))
    for name in ("a", "b"):
        (folder / "clips" / f"{name}.txt").write_text(f"clip {name}")
    (folder / "clips" / "00001.txt").write_text("another caption")
    (folder / "clips" / "00002.mp4").unlink()


def test_only_what_is_new_or_changed_is_encoded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(folder / "out")
    first = samples(ShardSet.open(str(folder / "out")))
    add(folder)
    shards = prepare(folder)
    found = samples(shards)
    # 00002 is gone, and its sample stays; the old 00001 is not used any more.
    assert list(found) == ["00000", "00002", "00001", "a", "b", "short"]
    assert found["00001"] == "another caption"
    assert found["00000"] == first["00000"]
    after = contents(folder / "out")
    kept = [name for name in before if name.startswith(("shard-", "generation-", "text"))]
    assert len(kept) == 6
    assert all(after[name] == before[name] for name in kept)
    assert "1 gone from the source (00002), whose samples stay until prune=true" in capsys.readouterr().out
    assert shards.manifest.skipped == 0
    # The state that runs have begun with can still be read, and is what it was.
    old = ShardSet.open(str(folder / "out"), generation=0)
    assert samples(old) == first
    assert old.manifest.model_dump() == type(old.manifest).model_validate_json(before[MANIFEST]).model_dump()
    second = contents(folder / "out")
    prepare(folder)
    assert contents(folder / "out") == second


def test_skipped_clips_are_tried_again_and_leave_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder / "out")
    prepare(folder)
    assert contents(folder / "out") == before
    good = folder / "clips" / "00000.mp4"
    monkeypatch.setattr(command, "read_windows", lambda source, *how, **more: read_windows(good, *how, **more))
    assert "short" in samples(prepare(folder))


def test_prompts_change_without_encoding_clips(folder: Path) -> None:
    before = contents(folder / "out")
    shards = prepare(folder, negative_prompt="grey", validation_prompts=("a red ball",))
    after = contents(folder / "out")
    assert {name for name in after.keys() - before.keys() if name.startswith("shard-")} == set()
    assert shards.manifest.negative_prompt == "grey"
    assert len(shards.texts.validation) == 1
    old = ShardSet.open(str(folder / "out"), generation=0)
    assert (old.manifest.negative_prompt, old.texts.validation) == ("", ())
    assert old.texts.negative.shape != shards.texts.negative.shape


def test_prune_removes_what_is_not_used(folder: Path) -> None:
    add(folder)
    found = samples(prepare(folder))
    shards = prepare(folder, prune=True)
    del found["00002"]
    assert samples(shards) == dict(sorted(found.items(), key=lambda pair: list(samples(shards)).index(pair[0])))
    assert shards.manifest.generations == 1
    assert shards.manifest.dropped == {}
    assert not (folder / "out" / "shard-000000.tar").exists()
    names = {shard.name for shard in shards.manifest.shards}
    assert {path.name for path in (folder / "out").glob("*.tar")} == names
    everything = b"".join(contents(folder / "out").values())
    assert b"00002.safetensors" not in everything
    before = contents(folder / "out")
    prepare(folder, prune=True)
    prepare(folder)
    assert contents(folder / "out") == before


def test_prune_and_growth_in_one_job(folder: Path) -> None:
    add(folder)
    assert sorted(samples(prepare(folder, prune=True))) == ["00000", "00001", "a", "b", "short"]


def every_kill(folder: Path, kills: str, prune: bool) -> Iterator[int]:
    """Numbers of the changes before which the job is killed: two of them, or all."""
    shutil.copytree(folder, folder / "all")
    count, code = changes(make_config(folder / "all", prune=prune))
    assert code == 0
    yield from (count // 3, count - 2) if kills == "two" else range(1, count + 1)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "kills", with_nightly(["two", "all", "all, and nothing is pruned"], ["all", "all, and nothing is pruned"])
)
def test_a_job_that_is_killed_while_the_folder_grows_ends_with_the_same_bytes(folder: Path, kills: str) -> None:
    add(folder)
    prune = "pruned" not in kills
    numbers = list(every_kill(folder, kills, prune))
    expected = contents(folder / "all" / "out")
    assert kills == "two" or len(numbers) > 10
    for number in numbers:
        place = folder / f"killed-{number}"
        for part in ("clips", "out"):
            shutil.copytree(folder / part, place / part)
        assert changes(make_config(place, prune=prune), number)[1] == -signal.SIGKILL
        assert changes(make_config(place, prune=prune))[1] == 0
        assert contents(place / "out") == expected, number


def test_a_killed_job_and_a_source_that_grows_meanwhile(folder: Path) -> None:
    """The generation that was begun is finished first, so that the order of additions is that of the jobs."""
    write_video(folder / "clips" / "a.mp4", range(0, 80, 10))
    (folder / "clips" / "a.txt").write_text("clip a")
    shutil.copytree(folder, folder / "undisturbed")
    # Killed after the generation's file has been written
    assert changes(make_config(folder), 2)[1] == -signal.SIGKILL
    prepare(folder / "undisturbed")
    for place in (folder, folder / "undisturbed"):
        shutil.copyfile(folder / "clips" / "00000.mp4", place / "clips" / "z.mp4")
        shutil.copyfile(folder / "clips" / "00000.txt", place / "clips" / "z.txt")
        os.utime(place / "clips" / "z.mp4", ns=(10**18, 10**18))
        prepare(place)
    assert contents(folder / "out") == contents(folder / "undisturbed" / "out")
    assert ShardSet.open(str(folder / "out")).manifest.at(None).samples == 5


def test_a_clip_that_goes_between_two_starts_is_skipped(folder: Path) -> None:
    write_video(folder / "clips" / "a.mp4", range(0, 80, 10))
    (folder / "clips" / "a.txt").write_text("clip a")
    assert changes(make_config(folder), 2)[1] == -signal.SIGKILL
    (folder / "clips" / "a.mp4").unlink()
    assert list(samples(prepare(folder))) == ["00000", "00001", "00002"]


def test_a_first_start_with_a_mistake_refuses_nothing(begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun / "clips", tmp_path / "clips")
    assert changes(make_config(tmp_path, frames=9), 4)[1] == -signal.SIGKILL  # with texts, and without a shard
    assert (tmp_path / "out" / "prepare.json").exists()
    prepare(tmp_path)
    left, right = contents(tmp_path / "out"), contents(begun / "out")
    assert left == right


def as_older_version(folder: Path) -> None:
    """Change a folder into one that a version without a ledger has written."""
    plan = make_plan(make_config(folder))
    settings = {key: value for key, value in plan.settings.items() if key != "kind"}
    settings |= {"negative_prompt": "", "validation_prompts": [], "source": older._listing_digest(plan.source)}
    (folder / "out" / "prepare.json").write_text(json.dumps(settings))
    (folder / "out" / "generation-000000.jsonl").unlink()


def test_a_folder_of_an_older_version_grows_too(folder: Path) -> None:
    expected = Ledger.read(folder / "out").generations
    as_older_version(folder)
    before = contents(folder / "out")
    (folder / "clips" / "00001.txt").write_text("another caption")
    write_video(folder / "clips" / "a.mp4", range(0, 80, 10))
    (folder / "clips" / "a.txt").write_text("clip a")
    found = samples(prepare(folder))
    assert list(found) == ["00000", "00002", "00001", "a"]
    assert found["00001"] == "another caption"
    assert Ledger.read(folder / "out").generations[0] == expected[0]
    after = contents(folder / "out")
    assert all(after[name] == before[name] for name in before if name.startswith("shard-"))


def test_an_unfinished_folder_of_an_older_version_continues(folder: Path) -> None:
    before = contents(folder / "out")
    as_older_version(folder)
    for name in (MANIFEST, "shard-000001.index.json"):
        (folder / "out" / name).unlink()
    settings = (folder / "out" / "prepare.json").read_bytes()
    write_video(folder / "clips" / "a.mp4", range(0, 80, 10))
    with pytest.raises(UserError, match="source: the list of clips has changed"):
        prepare(folder)
    (folder / "clips" / "a.mp4").unlink()
    prepare(folder)
    assert contents(folder / "out") == before | {"prepare.json": settings}
