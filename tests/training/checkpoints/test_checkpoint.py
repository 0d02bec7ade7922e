"""Checkpoints on the disk: whole or absent, complete, and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from anyflow_train.training.checkpoints import writing
from anyflow_train.training.checkpoints.config_file import decode_saved
from anyflow_train.training.checkpoints.reading import (
    DamagedCheckpoint,
    list_checkpoints,
    open_tensors,
    read_info,
    read_network,
    resolve_checkpoint,
    restore_tensors,
    verify_checkpoint,
)
from anyflow_train.training.checkpoints.state import Best, TrainState
from anyflow_train.training.checkpoints.tensor_handle import Entry
from anyflow_train.training.checkpoints.writing import mark_best, prune_checkpoints, save_checkpoint

CONFIG = RunConfig.model_validate(
    {
        "name": "test",
        "steps": 10,
        "student": {"architecture": {}},
        "objective": {"kind": "flow_matching"},
        "data": {"shards": "shards", "frames": 1, "height": 16, "width": 16},
    }
)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SHARD_BYTES", 64)


def tensors() -> dict[str, Tensor]:
    return {f"layer.{i}": torch.randn(4, i + 1, generator=torch.Generator().manual_seed(i)) for i in range(5)}


def entries(tensors: dict[str, Tensor]) -> dict[str, Entry]:
    return {name: Entry.of(tensor) for name, tensor in tensors.items()}


def write(folder: Path, step: int = 3, best: Best | None = None) -> Path:
    groups = {"weights": tensors().items(), "ema": tensors().items()}
    return save_checkpoint(folder, CONFIG, TrainState(step=step, best=best), {"student": step}, groups)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = write(tmp_path, best=Best(2, "energy_distance_4", 0.5))
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    restore_tensors(path, "weights", entries(targets))
    assert all(torch.equal(targets[name], tensor) for name, tensor in tensors().items())
    info = verify_checkpoint(path)
    assert info.state == TrainState(step=3, best=Best(2, "energy_distance_4", 0.5))
    assert info.adam_steps == {"student": 3}
    assert decode_saved(info.config, "here") == CONFIG


def test_files_are_bounded_and_named_by_group(tmp_path: Path) -> None:
    path = write(tmp_path)
    files = sorted(file.name for file in path.glob("weights-*"))
    # 16, 32, 48, 64 and 80 bytes in files of at most 64: 16 + 32 | 48 | 64 | 80, the last one alone over the bound
    assert files == [f"weights-{number:05d}.safetensors" for number in (1, 2, 3, 4)]
    with safe_open(path / files[0], framework="pt") as file:
        assert sorted(file.keys()) == ["layer.0", "layer.1"]


def test_tensors_are_streamed(tmp_path: Path) -> None:
    """Tensors may be gathered from other ranks one by one: none may be read before its file is written."""

    def produce() -> Iterator[tuple[str, Tensor]]:
        for number in range(6):
            written = len(list(tmp_path.glob(".step_*/weights-*")))
            assert number - written <= 1
            yield str(number), torch.zeros(16)

    path = save_checkpoint(tmp_path, CONFIG, TrainState(), {}, {"weights": produce()})
    assert len(list(path.glob("weights-*"))) == 6


@pytest.mark.parametrize("name", ["weights-00002.safetensors", "config.json", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_detected_and_the_file_named(tmp_path: Path, name: str, damage: str) -> None:
    path = write(tmp_path)
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) - 5] if damage == "truncate" else content)
    with pytest.raises(DamagedCheckpoint, match=name):
        verify_checkpoint(path)


def test_a_failed_save_leaves_nothing_that_looks_like_a_checkpoint(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.zeros(64)
        raise OSError("disk full")

    write(tmp_path, step=1)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, CONFIG, TrainState(step=2), {}, {"weights": broken()})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
    prune_checkpoints(tmp_path, 2, None)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_the_last_k_and_the_best_are_kept(tmp_path: Path) -> None:
    best = Best(2, "energy_distance_4", 0.1)
    for step in range(1, 7):
        write(tmp_path, step)
    mark_best(tmp_path, best)
    prune_checkpoints(tmp_path, 2, best)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best",
        "step_00000002",
        "step_00000005",
        "step_00000006",
    ]


def test_a_run_stands_for_its_best_checkpoint_or_its_latest(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (9, 10):
        write(folder, step)
    assert resolve_checkpoint(tmp_path) == folder / "step_00000010"
    mark_best(folder, Best(9, "energy_distance_4", 0.1))
    assert resolve_checkpoint(tmp_path) == folder / "step_00000009"
    assert resolve_checkpoint(folder / "step_00000010") == folder / "step_00000010"
    with pytest.raises(UserError, match="neither a checkpoint nor a run directory"):
        resolve_checkpoint(tmp_path / "nowhere")
    run = tmp_path / "distil" / "stage1"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=f"contains one; name a folder inside, such as {run}$"):
        resolve_checkpoint(run.parent)


def test_other_tensors_than_the_students_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    targets = tensors()
    with pytest.raises(UserError, match=r"lacks 'more'"):
        restore_tensors(path, "weights", entries({**targets, "more": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"shape \(4, 3\)"):
        restore_tensors(path, "weights", entries({**targets, "layer.2": torch.zeros(3)}))
    del targets["layer.4"]
    with pytest.raises(UserError, match=r"contains 'layer.4'"):
        restore_tensors(path, "weights", entries(targets))


@pytest.mark.parametrize("group", ["weights", "exp_avg_sq"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path, group: str, value: float) -> None:
    poisoned = tensors()
    poisoned["layer.3"][1, 2] = value
    groups = {group: poisoned.items()}
    path = save_checkpoint(tmp_path, CONFIG, TrainState(step=3), {"student": 3}, groups)
    with pytest.raises(UserError, match=rf"{path}: 'layer\.3' \({group}\) contains numbers that are not finite"):
        restore_tensors(path, group, entries(tensors()))


def test_a_format_of_the_future_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyflow_train.training.checkpoints.writing.FORMAT", 99)
    path = write(tmp_path)
    with pytest.raises(UserError, match="format 99"):
        read_info(path)
    assert json.loads((path / "state.json").read_text())["package_version"]


def test_any_shape_and_floating_dtype_comes_back(tmp_path: Path) -> None:
    odd = {
        "half": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "turned": torch.randn(2, 5).T,
        "Zahl π": torch.randn(1, dtype=torch.float64),
    }
    path = save_checkpoint(tmp_path, CONFIG, TrainState(), {}, {"weights": odd.items()})
    found = {name: file.get_tensor(name) for name, file in open_tensors(path, "weights").items()}
    assert found.keys() == odd.keys()
    for name, tensor in odd.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_file_without_a_checksum_is_found_at_a_resume(tmp_path: Path) -> None:
    path = write(tmp_path)
    (path / "weights-00009.safetensors").write_bytes((path / "weights-00001.safetensors").read_bytes())
    with pytest.raises(DamagedCheckpoint, match=r"weights-00009\.safetensors: is not listed in state\.json"):
        verify_checkpoint(path)


def test_a_damaged_checkpoint_is_a_user_error_wherever_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    (path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json: cannot be read"):
        read_network(path)
