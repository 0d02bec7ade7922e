"""An exported folder is complete or absent, and other files are safe."""

import os
from pathlib import Path

import pytest

from anyflow_train.errors import UserError
from anyflow_train.export.folder import MARKER, new_folder, write_marker


def export(out: Path, content: str, overwrite: bool = False) -> None:
    with new_folder(out, overwrite) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text(content)
        write_marker(folder, {"step": 3})


def test_a_new_folder_appears_whole(tmp_path: Path):
    export(tmp_path / "deep" / "out", "a")
    assert (tmp_path / "deep" / "out" / "sub" / "weights").read_text() == "a"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_files_are_as_open_as_the_folder(tmp_path: Path):
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "out", overwrite=False) as folder:
            (folder / "part").mkdir()
            for name in ("a", "part/b"):
                (folder / name).touch(mode=0o600)
    finally:
        os.umask(before)
    assert {oct((tmp_path / "out" / name).stat().st_mode & 0o777) for name in ("a", "part/b")} == {"0o640"}


def test_a_failure_leaves_nothing(tmp_path: Path):
    def fail() -> None:
        with new_folder(tmp_path / "out", False) as folder:
            (folder / "weights").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_earlier_export(tmp_path: Path):
    export(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", True):
        raise RuntimeError
    assert (tmp_path / "out" / "sub" / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_export_is_replaced_only_on_request(tmp_path: Path):
    export(tmp_path / "out", "old")
    with pytest.raises(UserError, match="overwrite=true"):
        export(tmp_path / "out", "new")
    export(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "sub" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_may_be_filled(tmp_path: Path):
    (tmp_path / "out").mkdir()
    export(tmp_path / "out", "a")
    assert (tmp_path / "out" / MARKER).is_file()


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_never_touched(tmp_path: Path, overwrite: bool):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no export made"):
        export(out, "a", overwrite)
    assert (out / "thesis.txt").read_text() == "mine"


def test_a_file_that_was_put_into_an_export_is_safe(tmp_path: Path):
    export(tmp_path / "out", "old")
    (tmp_path / "out" / "sub" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"sub/notes\.txt"):
        export(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "sub" / "notes.txt").read_text() == "mine"


def test_links_and_files_are_no_folders(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(UserError, match="not a folder"):
            export(tmp_path / name, "a", overwrite=True)
