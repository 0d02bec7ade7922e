"""Files are whole or absent."""

import errno
import fcntl
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from anyflow_train.errors import UserError
from anyflow_train.files import (
    atomic_file,
    check_writable,
    file_sha256,
    replace_file,
    take_lock,
    to_json,
    write_json,
    write_synced,
)


def test_a_file_takes_its_name_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "numbers.bin"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "numbers.bin"
    replace_file(path, b"old")
    with pytest.raises(TypeError), atomic_file(path) as file:  # noqa: PT012 (the block is what fails)
        file.write(b"half")
        file.write("text")  # type: ignore[arg-type]  # the wrong type is the test
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing" / "folder")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("/proc/x", "/proc/x/y", "file", "file/x", "nowhere", "nowhere/x", "loop"):
        with pytest.raises(UserError, match=r"out: '.*' cannot be written: '.*' is no folder with write access"):
            check_writable(tmp_path / name)
    check_writable(tmp_path / "new" / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop", "nowhere"]


def test_checksums_are_of_the_content(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    expected = hashlib.sha256(content).hexdigest()
    assert write_synced(tmp_path / "a", content) == expected
    assert file_sha256(tmp_path / "a") == expected


def test_json_depends_on_the_value_alone_and_keeps_its_letters(tmp_path: Path) -> None:
    assert to_json({"b": 1, "a": "é"}) == to_json({"a": "é", "b": 1}) == '{\n  "a": "é",\n  "b": 1\n}\n'.encode()
    write_json(tmp_path / "a.json", [1, 2])
    assert (tmp_path / "a.json").read_bytes() == to_json([1, 2])


def test_a_lock_has_one_holder_and_many_who_share_it(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "a+") as one, open(tmp_path / "lock", "a+") as two:
        assert take_lock(fcntl.flock, one.fileno(), fcntl.LOCK_EX, tmp_path)
        assert not take_lock(fcntl.flock, two.fileno(), fcntl.LOCK_SH, tmp_path)
        assert take_lock(fcntl.flock, one.fileno(), fcntl.LOCK_SH, tmp_path)
        assert take_lock(fcntl.flock, two.fileno(), fcntl.LOCK_SH, tmp_path)


def test_a_file_system_without_locks_gives_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(number: int) -> Callable[[int, int], None]:
        def lock(descriptor: int, kind: int) -> None:
            raise OSError(number, "refused")

        return lock

    assert take_lock(refuse(errno.ENOLCK), 0, fcntl.LOCK_EX, tmp_path)
    assert f"the file system of {tmp_path} does not support locks" in capsys.readouterr().err
    with pytest.raises(OSError, match="refused"):
        take_lock(refuse(errno.EIO), 0, fcntl.LOCK_EX, tmp_path)


def test_json_of_others_is_decoded_in_one_place() -> None:
    """`json.loads` raises RecursionError for deep JSON; `files.parse_json` turns it into ValueError."""
    package = Path(__file__).resolve().parents[1] / "anyflow_train"
    own = {"files.py", "manifest.py", "workers.py", "texts.py", "original.py", "pipelines.py"}
    sources = {path.name: path.read_text().replace("json.loads(json.dumps", "") for path in package.rglob("*.py")}
    assert {name for name, source in sources.items() if "json.loads(" in source} <= own
