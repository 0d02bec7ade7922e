"""Checkpoints from which a run may resume, and changes of the config that it refuses."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.training.checkpoints import reading
from anyflow_train.training.checkpoints.config_file import saved_config
from anyflow_train.training.checkpoints.resume import check_finished, check_unchanged, find_resume_point
from anyflow_train.training.checkpoints.run_directory import RunDirectory
from anyflow_train.training.checkpoints.state import TrainState
from anyflow_train.training.checkpoints.writing import save_checkpoint

BASE: dict[str, Any] = {
    "name": "test",
    "steps": 10,
    "student": {"architecture": {}},
    "objective": {"kind": "flow_map"},
    "data": {"shards": "shards", "frames": 1, "height": 16, "width": 16},
}


def config(**changes: Any) -> RunConfig:
    """The base config with dotted keys changed (`engine__micro_batch=1`)."""
    decoded = RunConfig.model_validate(BASE).model_dump(mode="json")
    for key, value in changes.items():
        *path, last = key.split("__")
        node = decoded
        for part in path:
            node = node[part]
        node[last] = value
    return RunConfig.model_validate(decoded)


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(folder, config(), TrainState(step=step), {"student": step}, {})


def damage(path: Path) -> None:
    (path / "state.json").write_bytes((path / "state.json").read_bytes()[:-20])


def test_the_newest_checkpoint_is_taken(tmp_path: Path) -> None:
    assert find_resume_point(tmp_path, config()) is None
    save(tmp_path, 9, 10)
    point = find_resume_point(tmp_path, config())
    assert point is not None
    assert point.state.step == 10


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1, 2, 3)
    damage(tmp_path / "step_00000003")
    point = find_resume_point(tmp_path, config())
    assert point is not None
    assert point.path.name == "step_00000002"
    warning = capsys.readouterr().err
    assert "step_00000003/state.json" in warning
    assert "step_00000002" in warning
    assert (tmp_path / "damaged_step_00000003").is_dir()


def test_a_run_of_damaged_checkpoints_never_starts_over_silently(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path / "step_00000001")
    damage(tmp_path / "step_00000002")
    for _ in range(2):
        with pytest.raises(UserError, match="every checkpoint is damaged"):
            find_resume_point(tmp_path, config())


def test_resume_never_refuses_to_write_over_a_run(tmp_path: Path) -> None:
    save(tmp_path, 4)
    with pytest.raises(UserError, match=r"checkpoint\.resume.*step_00000004"):
        find_resume_point(tmp_path, config(checkpoint__resume="never"))


def test_all_meaningful_changes_are_named_with_both_values() -> None:
    saved = config().model_dump(mode="json")
    with pytest.raises(UserErrors) as caught:
        check_unchanged(
            saved, config(seed=7, objective__epsilon=0.01, engine__micro_batch=1, optimizer__lr=1e-3), "run"
        )
    assert [error.where for error in caught.value.errors] == ["objective.epsilon", "optimizer.lr", "seed"]
    assert "0.01" in caught.value.errors[0].problem
    assert "0.005" in caught.value.errors[0].problem


def test_another_objective_is_named_by_its_kind() -> None:
    saved = config().model_dump(mode="json")
    with pytest.raises(UserErrors, match=r"objective\.kind"):
        check_unchanged(saved, RunConfig.model_validate({**BASE, "objective": {"kind": "flow_matching"}}), "run")


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 20},
        {"log_every": 1},
        {"checkpoint__keep": 5},
        {"tracker": {"kind": "tensorboard"}},
        {"evaluation__every": 7},
        {"evaluation__videos": 0},
        {"data__workers": 0},
        {"engine__threads": 1},
        {"engine__device": "cpu"},
        {"engine__micro_batch": 4},
    ],
)
def test_harmless_changes_pass(change: dict[str, Any]) -> None:
    check_unchanged(saved_config(config()), config(**change), "run")


def test_a_config_of_another_version_is_named() -> None:
    saved = {**config().model_dump(mode="json"), "colour": "red"}
    with pytest.raises(UserError, match="colour"):
        check_unchanged(saved, config(), "run")


def test_a_finished_run_says_so_unless_it_has_more_to_do(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert check_finished(directory, config()) is None
    directory.begin(config())
    directory.write_done({"step": 10})
    assert "finished" in (check_finished(directory, config()) or "")
    assert check_finished(directory, config(steps=11)) is None
    with pytest.raises(UserErrors, match="seed"):
        check_finished(directory, config(seed=3))


@pytest.mark.parametrize("name", ["done.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b'{"step": "x"', b"\xff\xfe", b"[]", None])
def test_a_damaged_summary_lets_the_run_resume_and_be_finished_again(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    directory = RunDirectory(tmp_path)
    directory.begin(config())
    directory.write_done({"step": 10})
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert check_finished(directory, config()) is None


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    save(tmp_path, 1, 2)
    monkeypatch.setattr(reading, "file_sha256", refuse)
    with pytest.raises(UserError, match=r"step_00000002/.*\(Permission denied\); mend that and start again"):
        find_resume_point(tmp_path, config())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]
