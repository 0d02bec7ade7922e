"""Saving in the background: the tensors are those of the saved step, and errors of the writer are reported."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from anyflow_train.training.checkpoints import saving, writing
from anyflow_train.training.checkpoints.reading import list_checkpoints, restore_tensors, verify_checkpoint
from anyflow_train.training.checkpoints.saving import Saver
from anyflow_train.training.checkpoints.state import TrainState
from anyflow_train.training.checkpoints.tensor_handle import Entry
from anyflow_train.training.processes import host_memory
from anyflow_train.training.processes.world import ALONE
from anyflow_train.training.trainer import Trainer
from tests.training.helpers import settings, train, write_latents

PATIENCE = 240.0


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def saver(tmp_path: Path, lines: list[str]) -> Iterator[Saver]:
    config = RunConfig.model_validate(settings(tmp_path, checkpoint__keep=5))
    saver = Saver(config, tmp_path / "checkpoints", ALONE, lines.append)
    yield saver
    saver.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let the writer wait until the returned event is set."""
    gate, original = threading.Event(), writing.write_synced

    def gated(*arguments: Any) -> str:
        assert gate.wait(PATIENCE)
        return original(*arguments)

    monkeypatch.setattr(writing, "write_synced", gated)
    return gate


def begin(saver: Saver, step: int, tensor: torch.Tensor) -> None:
    saver.save(TrainState(step=step), {"student": step}, {"weights": {"w": Entry.of(tensor)}})


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.glob("*.safetensors"))
    return {f"{file.name}: {name}": tensor for file in files for name, tensor in load_file(file).items()}


def test_training_on_does_not_change_what_is_saved(
    saver: Saver, gate: threading.Event, tmp_path: Path, lines: list[str]
) -> None:
    live = torch.arange(6.0).reshape(2, 3)
    begin(saver, 1, live)
    live.add_(100)
    assert list_checkpoints(tmp_path / "checkpoints") == []
    gate.set()
    saver.wait()
    found = torch.zeros(2, 3)
    restore_tensors(tmp_path / "checkpoints" / "step_00000001", "weights", {"w": Entry.of(found)})
    assert torch.equal(found, torch.arange(6.0).reshape(2, 3))
    assert lines == ["checkpoints are written in the background, from a copy of 0.0 MiB in memory"]


def test_a_save_waits_for_the_one_before_and_says_so(
    saver: Saver, gate: threading.Event, tmp_path: Path, lines: list[str]
) -> None:
    begin(saver, 1, torch.zeros(3))
    threading.Timer(0.2, gate.set).start()
    begin(saver, 2, torch.ones(3))
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")][:1] == ["step_00000001"]
    saver.wait()
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 2
    assert len(lines) == 2
    assert lines[1].startswith("step 2: waited ")


def test_a_run_saves_the_same_beside_the_training_as_in_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Save with a writer so slow that several steps are done before a checkpoint is complete."""
    write_latents(tmp_path / "shards")
    with monkeypatch.context() as patch:
        patch.setattr(saving, "free_memory", lambda: 0)
        reference = train(settings(tmp_path, name="reference"))
        assert "training pauses while checkpoints are written: a copy of" in capsys.readouterr().out
    original = writing.write_synced

    def slow(*arguments: Any) -> str:
        time.sleep(0.1)
        return original(*arguments)

    monkeypatch.setattr(writing, "write_synced", slow)
    run = train(settings(tmp_path))
    output = capsys.readouterr().out
    assert output.count("checkpoints are written in the background") == 1
    assert "for the previous checkpoint; increase checkpoint.every" in output
    pairs = list(zip(*(list_checkpoints(path / "checkpoints") for path in (run, reference)), strict=True))
    assert [path.name for path, _ in pairs] == ["step_00000006", "step_00000008"]
    for path, other in pairs:
        verify_checkpoint(path)
        found, expected = tensors(path), tensors(other)
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def fail_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let writing fail as on a full disk, from the n-th file on."""
    original, calls = writing.write_synced, 0

    def full(*arguments: Any) -> str:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    monkeypatch.setattr(writing, "write_synced", full)


def test_a_failed_write_is_noticed_without_asking_for_it(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(2, monkeypatch)
    begin(saver, 1, torch.zeros(3))
    deadline = time.monotonic() + PATIENCE
    while not saver.failed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(UserError, match=r"checkpoint of step 1 could not be written \(No space left on device\)"):
        begin(saver, 2, torch.zeros(3))
    assert list_checkpoints(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("memory", [1 << 50, 0], ids=["beside", "waiting"])
def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    write_latents(tmp_path / "shards")
    monkeypatch.setattr(saving, "free_memory", lambda: memory)
    fail_at(6 + 3, monkeypatch)  # 6 files a checkpoint
    with pytest.raises(UserError, match=r"checkpoint of step 4 could not be written \(No space left on device\)"):
        train(settings(tmp_path, steps=10_000))
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000002"]


def test_a_run_that_fails_still_ends_its_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    write_latents(tmp_path / "shards")
    original = Trainer._step

    def broken(self: Trainer, batches: Any) -> None:
        if self.state.step == 1:
            threading.Timer(0.2, gate.set).start()
            raise RuntimeError("broken")
        original(self, batches)

    monkeypatch.setattr(Trainer, "_step", broken)
    with pytest.raises(RuntimeError, match="broken"):
        train(settings(tmp_path, checkpoint__every=1))
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000001"]


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "groups" / "job" / "step"
    group.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/job/step\n")
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=8000 * 1024))
    for name, path in {"OWN_GROUP": "own", "GROUPS": "groups"}.items():
        monkeypatch.setattr(host_memory, name, tmp_path / path)
    assert host_memory.free_memory() == 8000 * 1024
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("1000000\n")
    for folder in (group, group.parent):
        (folder / "memory.current").write_text("700000\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 20000\nactive_file 3000\n")
    assert host_memory.free_memory() == 1000000 - 700000 + 23000
    (tmp_path / "own").unlink()
    assert host_memory.free_memory() == 8000 * 1024


def test_a_failed_save_leaves_no_temporary_folder_and_any_error_is_a_sentence(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> str:
        raise MemoryError("no memory for the header")

    monkeypatch.setattr(writing, "write_synced", broken)
    begin(saver, 1, torch.zeros(3))
    with pytest.raises(UserError, match=r"step 1 could not be written \(MemoryError: no memory for the header\)"):
        saver.wait()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_milestones_are_kept(tmp_path: Path) -> None:
    config = RunConfig.model_validate(settings(tmp_path, checkpoint__keep=1, checkpoint__keep_every=4))
    saver = Saver(config, tmp_path / "checkpoints", ALONE, print)
    for step in range(2, 12, 2):
        begin(saver, step, torch.zeros(3))
    saver.wait()
    saver.close()
    found = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert found == ["step_00000004", "step_00000008", "step_00000010"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_a_foreign_file_with_the_name_of_a_checkpoint_is_set_aside(saver: Saver, tmp_path: Path, kind: str) -> None:
    folder, other = tmp_path / "checkpoints", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (other / "mine").write_text("x")
    place = folder / "step_00000001"
    if kind == "file":
        place.write_text("x")
    else:
        place.symlink_to(other if kind == "link" else tmp_path / "nothing")
    begin(saver, 1, torch.zeros(3))
    saver.wait()
    verify_checkpoint(place)
    assert not place.is_symlink()
    assert os.path.lexists(folder / "damaged_step_00000001")
    assert (other / "mine").exists()


def test_too_little_space_is_said_before_the_first_step(
    saver: Saver, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {"weights": {"w": Entry.of(torch.zeros(1 << 28, device="meta"))}}  # 1 GiB; 5 are kept, 1 is written
    for free, said in ((6.5, 0), (5.5, 1)):
        monkeypatch.setattr(saving.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=int(free * 2**30)))
        saver.check_room(groups)
        assert len(lines) == said
    assert "has 5.50 GiB of free space, but a checkpoint takes 1.00 GiB, and the run keeps up to 6 of them" in lines[0]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_foreign_file_with_a_temporary_name_is_no_obstacle(saver: Saver, tmp_path: Path, kind: str) -> None:
    folder, place = tmp_path / "checkpoints", tmp_path / "checkpoints" / ".step_00000001.tmp"
    folder.mkdir()
    (tmp_path / "mine").write_text("x")
    place.write_text("x") if kind == "file" else place.symlink_to(tmp_path)
    begin(saver, 1, torch.zeros(3))
    saver.wait()
    assert [path.name for path in folder.iterdir()] == ["step_00000001"]
    assert (tmp_path / "mine").exists()
