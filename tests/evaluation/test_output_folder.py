"""Results are written to a folder that was checked before the work, and never over those of another origin."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from anyflow_train.commands import clips, sample
from anyflow_train.config.commands import ClipsConfig, EvaluateConfig, ExportConfig, PrepareConfig, SampleConfig
from anyflow_train.data.prepare.command import run as prepare
from anyflow_train.errors import UserError
from anyflow_train.evaluation import evaluate
from anyflow_train.export import run as export
from anyflow_train.files import begin_results, check_results, check_writable
from tests.export.runs import FULL, make_run

OWNER = {"checkpoint": "step_00000007 of run a"}


def test_the_first_owner_keeps_the_folder(tmp_path: Path) -> None:
    check_results(tmp_path / "out", "index.json", OWNER, ["grid.mp4"])
    assert not (tmp_path / "out").exists()
    begin_results(tmp_path / "out", "index.json", OWNER)
    (tmp_path / "out" / "grid.mp4").write_text("mine")
    check_results(tmp_path / "out", "index.json", OWNER, ["grid.mp4"])
    with pytest.raises(UserError, match=r"out: .* with checkpoint = 'step_00000007 of run a', and this is"):
        check_results(tmp_path / "out", "index.json", {"checkpoint": "step_00000009 of run b"}, [])


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "grid.mp4").write_text("of a report")
    check_results(tmp_path / "sub", "index.json", OWNER, ["grid.mp4"])
    with pytest.raises(UserError, match=r"holds 'grid\.mp4' of another origin"):
        check_results(tmp_path, "index.json", OWNER, ["a.mp4", "grid.mp4"])
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json' cannot be read"):
        check_results(tmp_path, "index.json", OWNER, [])


@pytest.mark.parametrize("mode", [0o555, 0o444])
def test_a_folder_without_permission_is_refused(mode: int) -> None:
    """Also if one may not even look for `out` there. Root may write everywhere, so another user checks for it."""
    with tempfile.TemporaryDirectory() as folder:  # other users cannot reach pytest's own folders
        Path(folder).chmod(mode)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                check_writable(Path(folder) / "out")
            except UserError as error:
                code = 0 if "cannot be written" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_every_command_finds_a_wrong_out_before_its_work(tmp_path: Path) -> None:
    """What is named here does not exist, so an error about `out` can only come first."""
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    with pytest.raises(UserError, match=r"^out: .* cannot be written"):
        sample.run(SampleConfig(model="/nowhere", out=out, prompts=("a",)))
    with pytest.raises(UserError, match=r"^out: .* cannot be written"):
        evaluate.run(EvaluateConfig(out=out, models=(), held_out="/nowhere", teacher="/nowhere"))
    with pytest.raises(UserError, match=r"^out: .* cannot be written"):
        export(ExportConfig(model="/nowhere", out=out))
    with pytest.raises(UserError, match=r"^out: .* cannot be written"):
        clips.run(ClipsConfig(out=out))
    with pytest.raises(UserError, match=r"^out: .* cannot be written"):
        prepare(PrepareConfig(out=out, source="/nowhere", codec="/nowhere"))


def test_clips_of_two_models_with_one_name_do_not_mix(tmp_path: Path) -> None:
    run = make_run(tmp_path, FULL)
    shutil.copytree(run, tmp_path / "copy")
    options = {"precision": "fp32", "text_length": 16, "device": "cpu", "calls": (1,), "out": str(tmp_path / "out")}
    for same in (run, tmp_path / "copy"):
        sample.run(SampleConfig(model=str(same), prompts=("a",), **options))
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"out: .* holds results with checkpoint = 'step_00000007 of run run"):
        sample.run(SampleConfig(model=str(make_run(tmp_path / "other", FULL, gate=0.5)), prompts=("b",), **options))
    with pytest.raises(UserError, match="holds results with weights = 'ema', and this is 'raw'"):
        sample.run(SampleConfig(model=str(run), prompts=("a",), weights="raw", **options))
    assert [video["prompt"] for video in json.loads((tmp_path / "out" / "index.json").read_text())["videos"]] == ["a"]
