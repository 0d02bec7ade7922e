"""Clips of others: nothing but regular files is opened, no address is, and no local path gets into shards."""

from __future__ import annotations

import http.server
import io
import json
import os
import tarfile
import threading
from pathlib import Path

import pytest

from anyflow_train.config.commands import PrepareConfig
from anyflow_train.data.captions import parse_captions
from anyflow_train.data.prepare.command import run
from anyflow_train.data.prepare.sources import list_clips, list_prompts
from anyflow_train.data.prepare.video import ClipError, read_clip
from anyflow_train.data.tar import scan
from anyflow_train.errors import UserError
from anyflow_train.tiny.clips import write_clips

ROOT = Path(__file__).resolve().parents[3]


def test_no_address_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    web = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{web.server_port}/x.ts"
    monkeypatch.chdir(tmp_path)
    segments = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n"
    Path("hls.m3u8").write_text(segments)
    Path("concat.mp4").write_text(f"ffconcat version 1.0\nfile {address}\n")
    Path("list.jsonl").write_text(json.dumps({"video": address, "caption": "a"}))
    (clip,) = list_clips("list.jsonl").clips
    assert clip.video is not None
    with pytest.raises(OSError, match="No such file"):
        clip.video.seekable()
    for source in (clip.video.path, Path("hls.m3u8"), Path("concat.mp4"), io.BytesIO(segments.encode())):
        with pytest.raises(ClipError, match="unreadable") as caught:
            read_clip(source, 1, 16, 16, 16.0)
        assert str(tmp_path) not in str(caught.value)
    web.shutdown()
    web.server_close()
    thread.join()
    assert asked == []


def test_fifos_and_devices_are_not_opened(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.txt"):
        os.mkfifo(tmp_path / name)
    (clip,) = list_clips(str(tmp_path)).clips
    assert clip.video is not None
    for read in (clip.video.read, clip.video.seekable, clip.read_captions):
        with pytest.raises(OSError, match="is not a regular file"):
            read()
    with pytest.raises(UserError, match="is not a regular file"):
        list_prompts(str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match="is not a regular file"):
        list_prompts("/dev/zero")


def test_a_caption_behind_a_link_out_of_the_folder_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    source = tmp_path / "clips"
    source.mkdir()
    (source / "all.txt").write_text("a red ball")
    for name, target in (("a", "../secret.txt"), ("b", "all.txt")):
        (source / f"{name}.mp4").touch()
        (source / f"{name}.txt").symlink_to(target)
    found = list_clips(str(source))
    assert [(clip.key, clip.read_captions()) for clip in found.clips] == [("b", ("a red ball",))]
    assert [(problem.key, problem.reason) for problem in found.problems] == [
        ("a", "caption is a link out of the folder")
    ]


def test_shards_hold_no_local_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codec = tmp_path / "codec"
    codec.symlink_to(ROOT / "assets" / "tiny-wan")
    write_clips(tmp_path / "clips", 2, seed=1)
    (tmp_path / "clips" / "bad.mp4").write_text("no video")
    names = ("00000", "00001", "bad", "missing")
    rows = [{"video": str(tmp_path / "clips" / f"{name}.mp4"), "caption": "a red ball"} for name in names]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = {"frames": 5, "height": 32, "width": 32, "precision": "fp32", "threads": 1}
    places = {"source": str(tmp_path / "list.jsonl"), "out": str(tmp_path / "out"), "codec": str(codec)}
    config = PrepareConfig.model_validate(places | sizes)
    run(config)
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode()[1:] not in path.read_bytes(), path.name
        assert str(ROOT).encode() not in path.read_bytes(), path.name
    index = json.loads((tmp_path / "out" / "shard-000000.index.json").read_text())
    assert [entry[0] for entry in index["entries"]] == ["00000", "00001"]
    assert [entry[0] for entry in index["skipped"]] == ["bad", "missing"]
    run(config)  # a second start knows the source again
    assert "is complete" in capsys.readouterr().out


def header(kind: bytes, size: int) -> bytes:
    """Make a tar header with any size, which may be negative or huge."""
    info = tarfile.TarInfo("a")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [b"0", b"L", b"K", b"x", b"g", b"S"])
@pytest.mark.parametrize("size", [2**62, 2**87, -1, -512, -(2**40)])
def test_sizes_in_tar_headers_are_bounded_by_the_file(kind: bytes, size: int) -> None:
    good = header(b"0", 3) + b"abc".ljust(512, b"\0")
    samples, _ = scan(io.BytesIO(good + header(kind, size) + good + bytes(1024)))
    members = [member for files in samples.values() for member in files.values()]
    assert all(member.offset >= 0 and member.size >= 0 and member.offset + member.size <= 4096 for member in members)


def test_a_long_chain_of_headers_is_damage() -> None:
    samples, damage = scan(io.BytesIO(header(b"L", 0) * 5000))
    assert samples == {}
    assert damage is not None


def test_a_huge_size_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(header(b"x", 2**45) + bytes(1024))
    with open(path, "rb") as file:
        assert scan(file)[0] == {}


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"caption": "x \\ud83d"}', b"\xff\xfe", b'{"caption": {"a": 1}}'])
def test_any_caption_is_text(data: bytes) -> None:
    assert parse_captions(data)[0].encode() is not None
