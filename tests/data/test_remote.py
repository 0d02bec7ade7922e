import functools
import http.server
import logging
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from anyflow_train.data import remote
from anyflow_train.data.loader import Loader
from anyflow_train.data.shards import BadSampleError, ShardSet
from anyflow_train.errors import UserError
from anyflow_train.text import GIB
from tests.data.helpers import alone, make_shards, numbers, take

SIZES = [4, 4, 4, 4]


@dataclass(frozen=True)
class Server:
    """Web server of a shard folder: its address, the requested files, and the folder."""

    url: str
    requests: Counter[str]
    folder: Path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = make_shards(tmp_path / "served", SIZES)
    requests: Counter[str] = Counter()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            requests[self.path.lstrip("/")] += 1

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    yield Server(f"http://127.0.0.1:{web.server_port}", requests, folder)
    web.shutdown()
    web.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.0)


def stream(shards: ShardSet, workers: int) -> list[int]:
    with closing(Loader(alone(shards), 1, 8, [tuple(range(8))], (8,), workers)) as loader:
        return [number for step in take(iter(loader), 6) for number in numbers(step)]


def copies(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("workers", [0, 4])
def test_remote_shards_give_the_same_stream_and_are_copied_once(server: Server, tmp_path: Path, workers: int) -> None:
    expected = stream(ShardSet.open(str(server.folder)), 0)
    cache = tmp_path / "cache"
    assert stream(ShardSet.open(server.url, str(cache)), workers) == expected
    assert stream(ShardSet.open(server.url, str(cache)), workers) == expected
    assert [server.requests[f"shard-{number:06d}.tar"] for number in range(4)] == [1, 1, 1, 1]
    assert len(copies(cache)) == 4


@pytest.mark.parametrize("workers", [0, 4])
def test_a_cache_for_two_shards_stays_within_its_bound(server: Server, tmp_path: Path, workers: int) -> None:
    size = (server.folder / "shard-000000.tar").stat().st_size
    shards = ShardSet.open(server.url, str(tmp_path / "cache"), 2.5 * size / GIB)
    assert stream(shards, workers) == stream(ShardSet.open(str(server.folder)), 0)
    assert 1 <= len(copies(tmp_path / "cache")) <= 2


def test_the_least_recently_used_copy_goes_first(server: Server, tmp_path: Path) -> None:
    size = (server.folder / "shard-000000.tar").stat().st_size
    shards = ShardSet.open(server.url, str(tmp_path / "cache"), 2.5 * size / GIB)
    for index in (0, 4, 0, 8):  # shards 0, 1, 0 again, 2
        shards.read(index)
    assert sorted(path.name.split("-", 1)[1] for path in copies(tmp_path / "cache")) == [
        "shard-000000.tar",
        "shard-000002.tar",
    ]


def test_groups_of_shards_are_copied_once_an_epoch_by_a_small_cache(server: Server, tmp_path: Path) -> None:
    size = (server.folder / "shard-000000.tar").stat().st_size
    shards = ShardSet.open(server.url, str(tmp_path / "cache"), 2.5 * size / GIB)
    with closing(Loader(alone(shards), 1, 8, [tuple(range(8))], (8,), 0, shuffle_shards=1)) as loader:
        take(iter(loader), 2)  # one epoch
    assert [server.requests[f"shard-{number:06d}.tar"] for number in range(4)] == [1, 1, 1, 1]


READER = """
import os, sys
from pathlib import Path
from anyflow_train.data.remote import RemoteFolder
folder = RemoteFolder(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), "v")
for turn in range(10):
    for number in range(4):
        file = folder.open(f"shard-{number:06d}.tar", None)
        assert os.fstat(file).st_size == int(sys.argv[4])
        os.close(file)
"""


def test_processes_share_a_cache(server: Server, tmp_path: Path) -> None:
    size = (server.folder / "shard-000000.tar").stat().st_size
    command = [sys.executable, "-c", READER, server.url, str(tmp_path / "cache"), str(5 * size // 2), str(size)]
    readers = [subprocess.Popen(command) for _ in range(3)]
    assert [reader.wait(timeout=120) for reader in readers] == [0, 0, 0]
    assert len(copies(tmp_path / "cache")) <= 2


def test_other_shards_at_the_same_url_are_not_taken_for_the_old_ones(server: Server, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    assert ShardSet.open(server.url, cache).read(0).key == "clip-000"
    make_shards(server.folder, [2, 2])
    assert ShardSet.open(server.url, cache).read(2).key == "clip-002"


def test_a_shard_of_the_wrong_size_is_tried_again_then_bad(server: Server, tmp_path: Path, caplog) -> None:
    shard = server.folder / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-700])
    shards = ShardSet.open(server.url, str(tmp_path / "cache"))
    for index in (4, 5):
        with (
            caplog.at_level(logging.WARNING),
            pytest.raises(BadSampleError, match="bytes arrived, but the manifest says"),
        ):
            shards.read(index)
    assert server.requests["shard-000001.tar"] == remote.ATTEMPTS
    assert "trying again" in caplog.text
    assert copies(tmp_path / "cache") == []


def test_a_missing_shard_is_bad_without_further_trials(server: Server, tmp_path: Path) -> None:
    (server.folder / "shard-000001.tar").unlink()
    shards = ShardSet.open(server.url, str(tmp_path / "cache"))
    with pytest.raises(BadSampleError, match="404"):
        shards.read(4)
    assert server.requests["shard-000001.tar"] <= 2  # the server logs a failed request twice
    assert shards.read(0).key == "clip-000"


def test_a_remote_shard_without_an_index_gets_one(server: Server, tmp_path: Path) -> None:
    (server.folder / "shard-000000.index.json").unlink()
    assert ShardSet.open(server.url, str(tmp_path / "cache")).read(3).caption == "caption 3"


@pytest.mark.parametrize("location", ["pipe:cat {folder}/{{}}", "file://{folder}"])
def test_pipes_and_fsspec_urls_are_read(tmp_path: Path, location: str) -> None:
    folder = make_shards(tmp_path / "served", SIZES)
    shards = ShardSet.open(location.format(folder=folder), str(tmp_path / "cache"))
    assert [shards.read(index).key for index in (0, 15)] == ["clip-000", "clip-015"]


@pytest.mark.parametrize("location", ["http://127.0.0.1:9/nothing", "pipe:false {}", "nosuch://place"])
def test_an_unreachable_place_is_one_clear_line(location: str) -> None:
    with pytest.raises(UserError, match=r"cannot read manifest.json") as caught:
        ShardSet.open(location)
    assert "\n" not in str(caught.value)
