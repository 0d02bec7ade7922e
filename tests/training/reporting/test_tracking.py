"""The run's own metrics file, and both trackers without a network."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anyflow_train.config.run import RunConfig, WandbTracker
from anyflow_train.errors import UserError
from anyflow_train.training.checkpoints.run_directory import RunDirectory
from anyflow_train.training.reporting.tracking import MetricsFile, Trackers
from anyflow_train.training.start_checks import check_tracker

BASE: dict[str, Any] = {
    "name": "test",
    "steps": 10,
    "student": {"architecture": {}},
    "objective": {"kind": "flow_map"},
    "data": {"shards": "shards", "frames": 1, "height": 16, "width": 16},
}


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_has_one_line_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (1, 2, 3):
        file.log(step, {"loss": 0.5}, {})
    file.close()
    with path.open("a") as cut:
        cut.write('{"step": 4, "lo')
    file = MetricsFile(path, 2)
    file.log(3, {"loss": 0.25}, {})
    file.close()
    assert steps(path) == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1])["loss"] == 0.25


def test_damaged_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\x00\n3\n{"loss": 1}\n{"step": "two"}\n{"step": 2}\n')
    MetricsFile(path, 2).close()
    assert steps(path) == [1, 2]


class Service:
    """wandb without a server: the online mode fails, and the offline folders are files with one row per line."""

    class Error(Exception):
        pass

    class Run:
        def __init__(self, folder: Path, fails: bool) -> None:
            folder.mkdir(parents=True)
            self.dir, self.fails, self.rows = str(folder / "files"), fails, folder / "rows"
            self.rows.write_text("")

        def log(self, values: dict[str, Any], step: int) -> None:
            if self.fails:
                raise ConnectionError("the server is down")
            with self.rows.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

        def finish(self) -> None:
            pass

    def __init__(self, reachable: bool) -> None:
        self.reachable, self.number = reachable, 0

    Settings = dict

    def init(self, mode: str, dir: str, id: str, **options: Any) -> Run:
        if mode == "online" and not self.reachable:
            raise self.Error("entity nobody not found\nmore lines")
        self.number += 1
        kind = "offline-run" if mode == "offline" else "run"
        return self.Run(Path(dir) / "wandb" / f"{kind}-{self.number}-{id}", fails=mode == "online")


@pytest.mark.parametrize("reachable", [False, True], ids=["at the start", "later"])
def test_a_run_that_loses_wandb_goes_on_offline_and_is_uploaded_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reachable: bool
) -> None:
    config = RunConfig.model_validate({**BASE, "tracker": {"kind": "wandb", "entity": "nobody"}})
    service = Service(reachable)
    monkeypatch.setitem(sys.modules, "wandb", service)
    for resumed, last in ((0, 3), (2, 4)):
        trackers = Trackers(config, RunDirectory(tmp_path), resumed)
        for step in range(resumed + 1, last + 1):
            trackers.log(step, {"loss": float(step + resumed)})
        trackers.close()
    output = capsys.readouterr()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert f"upload it with: wandb sync {folder}\n" in output.out
    reason = "the server is down" if reachable else "entity nobody not found"
    assert f"warning: tracker: wandb is not online ({reason}); the data are kept on disk; upload" in output.err
    rows = [json.loads(line) for line in (folder / "rows").read_text().splitlines()]
    # a step that was repeated is there once, as in the metrics file
    assert rows == [{"step": step, "train/loss": float(loss)} for step, loss in ((1, 1), (2, 2), (3, 5), (4, 6))]


def test_a_tracker_that_fails_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    config = RunConfig.model_validate({**BASE, "tracker": {"kind": "tensorboard"}})
    trackers = Trackers(config, RunDirectory(tmp_path), 0)
    assert "warning: tracker: cannot start and is left out (FileExistsError" in capsys.readouterr().err
    trackers.log(1, {"loss": 0.5})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MetricsFile, "log", full)
    trackers.log(2, {"loss": 0.5})
    trackers.log(3, {"loss": 0.5})
    trackers.close()
    assert capsys.readouterr().err.count("warning: tracker: MetricsFile failed and is left out (OSError") == 1
    assert steps(tmp_path / "metrics.jsonl") == [1]


def test_wandb_without_a_key_is_found_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"tracker\.mode: is online, but wandb has no API key"):
        check_tracker(WandbTracker(kind="wandb"))
    check_tracker(WandbTracker(kind="wandb", mode="offline"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_tracker(WandbTracker(kind="wandb"))


@pytest.mark.parametrize(
    ("tracker", "pattern"),
    [
        ({"kind": "tensorboard"}, "tensorboard/events*"),
        ({"kind": "wandb", "mode": "offline"}, "wandb/offline-run-*/*.wandb"),
        ({"kind": "none"}, "metrics.jsonl"),
    ],
)
def test_trackers_write_into_the_run_directory(tmp_path: Path, tracker: dict[str, str], pattern: str) -> None:
    trackers = Trackers(RunConfig.model_validate({**BASE, "tracker": tracker}), RunDirectory(tmp_path), 0)
    trackers.log(1, {"loss": 0.5})
    trackers.close()
    assert len(list(tmp_path.glob(pattern))) == 1
    assert steps(tmp_path / "metrics.jsonl") == [1]


def test_tensorboard_has_groups_the_config_and_videos_that_move(tmp_path: Path) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "grid.gif", save_all=True, append_images=frames[1:])
    directory = RunDirectory(tmp_path)
    config = RunConfig.model_validate({**BASE, "tracker": {"kind": "tensorboard"}})
    directory.begin(config)
    trackers = Trackers(config, directory, 0)
    trackers.log(3, {"loss": 0.5, "validation/energy_distance_4": 0.25}, {"grid": tmp_path / "grid.mp4"})
    trackers.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0, "tensors": 0})
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"train/loss", "validation/energy_distance_4"}
    (picture,) = found.Images("videos/grid")
    assert (picture.step, picture.width, picture.height) == (3, 8, 6)
    assert picture.encoded_image_string == (tmp_path / "grid.gif").read_bytes()
    assert b'"optimizer"' in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def logged(data: bytes) -> Iterator[bytes]:
    """Read the records of a .wandb file: blocks of 32 KiB with pieces of records (checksum, size, kind), as LevelDB."""
    place, record = 7, b""  # after the file's header
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
        size, kind = struct.unpack_from("<HB", data, place + 4)
        if place + 7 + size > len(data):
            return  # it is being written
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield record
            record = b""


def finished_records(path: Path) -> list[Any]:
    """Read the records of a .wandb file that ends with the run. Wandb's own process writes it, also after `finish`."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 60
    while True:
        records = [Record.FromString(record) for record in logged(path.read_bytes())]
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.nightly
def test_a_resumed_offline_run_of_wandb_itself_is_one_run(tmp_path: Path) -> None:
    """Read from wandb's own files, which `wandb sync` uploads: one folder and id, and each step once."""
    config = RunConfig.model_validate({**BASE, "tracker": {"kind": "wandb", "mode": "offline"}})
    for resumed, last in ((0, 3), (2, 4)):
        trackers = Trackers(config, RunDirectory(tmp_path), resumed)
        for step in range(resumed + 1, last + 1):
            trackers.log(step, {"loss": float(step + resumed)})
        trackers.close()
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    ids, rows = [], []
    for record in finished_records(path):
        if record.HasField("run"):
            ids.append(record.run.run_id)
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append((record.history.step.num, float(items["train/loss"])))
    assert set(ids) == {(tmp_path / "wandb_id").read_text()}
    assert rows == [(1, 1.0), (2, 2.0), (3, 5.0), (4, 6.0)]
