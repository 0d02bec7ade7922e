"""Several real processes prepare one folder, and some of them are killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from anyflow_train.config.commands import PrepareConfig
from anyflow_train.data.prepare.command import run
from anyflow_train.data.shards import ShardSet
from anyflow_train.errors import UserError
from anyflow_train.tiny.clips import write_clips
from tests.data.prepare.crews import finish, start
from tests.data.prepare.videos import hold, write_video

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {
    "codec": str(ROOT / "assets" / "tiny-wan"),
    "frames": 5,
    "height": 32,
    "width": 32,
    "samples_per_shard": 2,
    "batch": 2,
    "precision": "fp32",
    "threads": 1,
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine clips, five shards; the fourth clip is too short, the last one has no caption."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, 9, seed=3)
    write_video(folder / "00003.mp4", [1, 2])
    (folder / "00008.txt").unlink()
    return folder


@pytest.fixture(scope="module")
def alone(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Shards that a single process makes of the clips."""
    out = tmp_path_factory.mktemp("alone")
    run(make_config(clips, out))
    return contents(out)


def make_config(source: Path, out: Path, **changes: object) -> PrepareConfig:
    return PrepareConfig.model_validate({"source": str(source), "out": str(out), **SETTINGS, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files, including hidden ones; the lock is empty."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wait_for(file: Path, crew: list[BaseProcess]) -> None:
    while not file.exists():
        assert all(process.is_alive() for process in crew)
        time.sleep(0.01)


def check_two_processes(out: Path, alone: dict[str, bytes], printed: str, progress: str) -> None:
    assert contents(out) == alone
    assert printed.count("7 samples in 5 shards from 9 clips; 2 skipped") == 1
    # the clips of both, shown by one
    assert progress.count("clips: 9/9 clips") == 1
    assert ShardSet.open(str(out)).manifest.skipped == 2


def test_two_processes_make_the_same_folder(clips: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert finish(start([make_config(clips, tmp_path / "out")] * 2, log)) == [0, 0]
    check_two_processes(tmp_path / "out", alone, log.read_text(), log.read_text())


@pytest.mark.nightly  # faster: the case before it
def test_two_processes_of_a_launch_make_the_same_folder(clips: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "ddp.yaml")]
    options = ["--num_processes", "2", "--main_process_port", "0", "-m", "anyflow_train", "prepare"]
    words = [f"{key}={value}" for key, value in SETTINGS.items()] + [f"source={clips}", f"out={tmp_path / 'out'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *options, *words], capture_output=True, text=True, env=environment, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    check_two_processes(tmp_path / "out", alone, done.stdout, done.stderr)


def test_a_killed_job_is_continued_by_another_number_of_processes(
    clips: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    source, out = tmp_path / "clips", tmp_path / "out"
    shutil.copytree(clips, source)
    # A clip of the fourth shard cannot be read: process 1 waits there forever, and process 0 for process 1.
    fifo = hold(source / "00006.mp4")
    crew = start([make_config(source, out)] * 2, tmp_path / "log")
    for number in (0, 1, 2, 4):
        wait_for(out / f"shard-00000{number}.index.json", crew)
    crew[0].kill()
    assert finish(crew[:1]) == [-signal.SIGKILL]
    with pytest.raises(UserError, match="another `anyflow prepare` is writing"):
        run(make_config(source, out))
    crew[1].kill()
    assert finish(crew[1:]) == [-signal.SIGKILL]
    assert not (out / "manifest.json").exists()
    fifo.unlink()
    before = (out / "shard-000000.tar").stat().st_mtime_ns
    assert finish(start([make_config(source, out)] * 3, tmp_path / "log")) == [0, 0, 0]
    assert contents(out) == alone
    assert (out / "shard-000000.tar").stat().st_mtime_ns == before
    assert finish(start([make_config(source, out)] * 2, tmp_path / "again")) == [0, 0]
    assert (tmp_path / "again").read_text().count("is complete: 7 samples") == 1


def test_a_mistake_is_said_once_whoever_makes_it(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    out, lines = tmp_path / "out", []
    cases = [
        [make_config(clips, tmp_path / "foreign")] * 2,
        [make_config(clips, out), make_config(clips, out, frames=9)],
        [make_config(clips, out), make_config(clips, tmp_path / "elsewhere")],
    ]
    for number, configs in enumerate(cases):
        log = tmp_path / f"log{number}"
        first, second = finish(start(configs, log))
        assert first == 2
        assert second in (1, 2)  # as process 0 ends before it or after it
        lines.append([line for line in log.read_text().splitlines() if line.startswith("error")])
    assert [len(found) for found in lines] == [1, 1, 1]
    assert "holds other files (thesis.tex)" in lines[0][0]
    assert "error: frames: is 9 on process 1" in lines[1][0]
    assert "elsewhere on process 1" in lines[2][0]
