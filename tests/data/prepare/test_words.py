"""Captions as people have them: encodings, JSON of any shape, lists, metadata files, and tars."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from anyflow_train.config.commands import PrepareConfig
from anyflow_train.data.loader import Loader
from anyflow_train.data.prepare.captions import CaptionError, CaptionReader
from anyflow_train.data.prepare.command import run
from anyflow_train.data.prepare.sources import list_clips, list_prompts
from anyflow_train.data.shards import ShardSet
from anyflow_train.errors import UserError
from anyflow_train.tiny.clips import write_clips
from tests.data.helpers import alone

CODEC = Path(__file__).resolve().parents[3] / "assets" / "tiny-wan"
UNICODE = "Bär 熊 🐻"


@pytest.mark.parametrize(
    ("data", "kind", "options", "wanted"),
    [
        (UNICODE.encode(), "txt", {}, [UNICODE]),
        (UNICODE.encode("utf-8-sig"), "txt", {}, [UNICODE]),
        (UNICODE.encode("utf-16"), "txt", {}, [UNICODE]),
        (b"\xfe\xff" + UNICODE.encode("utf-16-be"), "txt", {}, [UNICODE]),
        (UNICODE.encode(), "txt", {"encoding": "gbk"}, [UNICODE]),
        ("红球".encode("gbk"), "txt", {"encoding": "gbk"}, ["红球"]),
        ("Bär".encode("cp1252"), "txt", {}, ["Bär"]),
        ("red".encode("utf-16-le"), "txt", {}, "zero bytes"),
        ("red".encode("utf-16-le"), "txt", {"encoding": "utf-16-le"}, ["red"]),
        (b"a \x81", "txt", {}, "line 1"),
        (b'\xef\xbb\xbf{"cap": "red"}', "json", {}, ["red"]),
        (b'{"Caption": ["red", "", "crimson"]}', "json", {}, ["red", "crimson"]),
        (b'["red", "crimson"]', "json", {}, ["red", "crimson"]),
        (b'{"caption": "x", "title": "red"}', "json", {"key": "Title"}, ["red"]),
        (b'{"caption": "x"}', "json", {"key": "title"}, "no caption_key: title"),
        (b'{"caption": "a \\ud83d"}', "json", {}, ["a"]),
        (b'{"caption": {"en": "red"}}', "json", {}, 'not text: {"en": "red"}'),
        (b'{"caption": 5}', "json", {}, "not text: 5"),
        (b'{"caption": "red', "json", {}, "broken JSON"),
        (b"[" * 100_000, "json", {}, "nested too deeply"),
    ],
)
def test_a_caption_file(data: bytes, kind: str, options: dict[str, str], wanted: list[str] | str) -> None:
    reader = CaptionReader(**options)
    if isinstance(wanted, list):
        assert list(reader.from_file(data, kind, "a")) == wanted
    else:
        with pytest.raises(CaptionError, match=wanted):
            reader.from_file(data, kind, "a")


def test_a_guess_is_said_once_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    reader = CaptionReader()
    assert reader.decode("熊\nBär\nfür\n".encode().replace("ä".encode(), b"\xe4"), "a.txt") == "熊\nBär\nfür\n"
    reader.decode(b"\xfcber", "b.txt")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "warning: a.txt line 2 is not UTF-8, read as cp1252; set encoding= if this is wrong: Bär"


ROWS = [{"video": "a.mp4", "caption": "red"}, {"video": "b.mp4", "caption": ["blue", "navy"]}]
BOTH = {"a": ("red",), "b": ("blue", "navy")}
ONE_EACH = {"a": ("red",), "b": ("blue",)}


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("l.CSV", "Video;Caption\na.mp4;red\n\nb.mp4;blue\n", ONE_EACH),
        ("l.tsv", "file_name\ttext\na.mp4\tred\nb.mp4\tblue\n", ONE_EACH),
        ("l.csv", "video,caption\na.mp4,red, big\n", "l.csv line 2 has 3 fields, but the first line has 2"),
        ("l.csv", 'video,caption\na.mp4,red\nb.mp4,"blue\nc.mp4,green\n', "l.csv line 3: the row has a stray quote"),
        ("l.csv", 'video,caption\na.mp4,"red\nb.mp4,"blue"\n', "l.csv line 2: the row has a stray quote"),
        ("l.jsonl", "\n".join(map(json.dumps, ROWS)), BOTH),
        ("l.jsonl", '{"video": "a.mp4", "caption": "red \\ud83d"}', {"a": ("red",)}),
        ("l.jsonl", '{"video": 7}', "l.jsonl line 1 names no video"),
        ("l.json", json.dumps(ROWS), BOTH),
        ("l.json", json.dumps({"a.mp4": "red", "b.mp4": {"cap": ["blue", "navy"]}}), BOTH),
        ("l.json", '[{"video": "a.mp4"', "l.json is broken JSON: .*line 1"),
        ("l.txt", "a.mp4\nb.mp4\n", {"a": ("of a file",), "b": ()}),
    ],
)
def test_lists(tmp_path: Path, name: str, text: str, wanted: dict[str, tuple[str, ...]] | str) -> None:
    (tmp_path / "a.txt").write_text("of a file")
    (tmp_path / name).write_text(text)
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted):
            list_clips(str(tmp_path / name))
    else:
        assert {clip.key: clip.read_captions() for clip in list_clips(str(tmp_path / name)).clips} == wanted


def test_a_caption_of_the_wrong_type_costs_its_clip_only(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text('{"video": "a.mp4", "caption": 5}\n{"video": "b.mp4", "caption": "blue"}\n')
    found = list_clips(str(tmp_path / "l.jsonl"))
    assert [clip.key for clip in found.clips] == ["b"]
    assert [problem.reason for problem in found.problems] == ["the caption is not text: 5 (l.jsonl line 1)"]


def test_a_wrong_key_is_said_with_the_columns(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("video,title\na.mp4,red\n")
    assert list_clips(str(tmp_path / "l.csv"), CaptionReader("title")).clips[0].read_captions() == ("red",)
    with pytest.raises(UserError, match=r"caption_key: 'headline' is in no row of .*, which has: video, title"):
        list_clips(str(tmp_path / "l.csv"), CaptionReader("headline"))


def test_parquet(tmp_path: Path) -> None:
    rows = [row | {"bytes": b"video"} for row in ({"video": "a.mp4", "caption": ["red"]}, ROWS[1])]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "l.parquet")
    assert {clip.key: clip.read_captions() for clip in list_clips(str(tmp_path / "l.parquet")).clips} == BOTH


def test_metadata_in_a_folder(tmp_path: Path) -> None:
    files = {
        "one/metadata.csv": "file_name,text\na.mp4,red\n",
        "one/b.txt": "blue",
        "two/videos2caption.json": json.dumps([{"path": "c.mp4", "cap": ["green", "lime"]}, {"path": "d.mp4"}]),
        "notes.pdf": "",
        "one/readme": "",
    }
    for name in ("one/a.mp4", "one/b.MP4", "two/videos/c.mp4", *files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(files.get(name, ""))
    (tmp_path / "link").symlink_to(tmp_path / "one")
    found = list_clips(str(tmp_path))
    captions = {clip.key: clip.read_captions() for clip in found.clips}
    wanted = {"one/a": ("red",), "one/b": ("blue",), "two/videos/c": ("green", "lime"), "two/d": ()}
    assert captions == wanted
    assert found.unused == {".pdf": 1, "without extension": 1, "link to a folder (link)": 1}


def tar(path: Path, files: dict[str, str], links: dict[str, str]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            archive.addfile(info)


def test_tars_with_links_and_dots_and_compression(tmp_path: Path) -> None:
    files = {"a.v1.mp4": "1", "a.low.ts": "2", "a.txt": "red", "x/._a.mp4": "mac", "b.txt": "blue", "c.pdf": "x"}
    tar(tmp_path / "w.tar", files, {"b.mp4": "a.v1.mp4"})
    (tmp_path / "w.tar.gz").write_bytes(gzip.compress((tmp_path / "w.tar").read_bytes()))
    for name in ("w.tar", "w.tar.gz"):
        found = list_clips(str(tmp_path / name))
        rows = [(clip.key, clip.video.read(), *clip.read_captions()) for clip in found.clips if clip.video]
        assert rows == [("w/a_v1", b"1", "red"), ("w/a_low", b"2", "red"), ("w/b", b"1", "blue")]
        assert found.unused == {".pdf": 1}
    cut = (tmp_path / "w.tar.gz").read_bytes()[:-40]
    (tmp_path / "w.tar.gz").write_bytes(cut)
    with pytest.raises(UserError, match=r"w\.tar\.gz: damaged tar"):
        list_clips(str(tmp_path / "w.tar.gz"))


def test_prompts_may_be_a_list_and_start_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("one\n\ntwo".encode("utf-8-sig"))
    (tmp_path / "p.csv").write_text("id,prompt\n1,one\n2,two\n")
    for name in ("p.txt", "p.csv"):
        assert [clip.read_captions() for clip in list_prompts(str(tmp_path / name)).clips] == [("one",), ("two",)]


def test_all_captions_are_encoded_and_one_is_drawn_per_epoch(tmp_path: Path, capsys) -> None:
    write_clips(tmp_path / "clips", 3, seed=3)
    clips = tmp_path / "clips"
    (clips / "00000.txt").unlink()
    (clips / "00000.json").write_text(json.dumps({"caption": ["red ball", "blue square", "green"]}))
    (clips / "00001.txt").write_text("a red ball " * 20)
    (clips / "00002.txt").write_bytes(b"\x81")
    (clips / "notes.pdf").touch()
    settings = {"frames": 5, "height": 32, "width": 32, "precision": "fp32", "threads": 1, "max_text_length": 16}
    places = {"source": str(clips), "out": str(tmp_path / "out"), "codec": str(CODEC)}
    run(PrepareConfig.model_validate(places | settings))
    output = capsys.readouterr().out
    assert "2 samples in 1 shards from 3 clips; 1 skipped (1 unreadable caption)" in output
    assert "2 not used (1 .json, 1 .pdf); found 5 = 2 encoded + 1 skipped + 2 not used" in output
    assert "1 with a caption of more than 16 tokens, cut there (for example 00001)" in output
    shards = ShardSet.open(str(tmp_path / "out"))
    sample = shards.read(0)
    captions = ["red ball", "blue square", "green"]
    assert [sample.with_caption(number).caption for number in range(4)] == [*captions, captions[0]]
    texts = [sample.with_caption(number).text for number in range(3)]
    assert len({tuple(text.flatten().tolist()) for text in texts}) == 3
    assert shards.manifest.longest_text == 16
    loader = Loader(alone(shards), 1, 2, [(0, 1)], (16,), workers=0)
    batches = iter(loader)
    drawn = [batch.condition.text[batch.keys.index("00000")] for _ in range(20) for batch in next(batches)]
    padded = [next(n for n, text in enumerate(texts) if text.equal(draw[: len(text)])) for draw in drawn]
    assert min(padded.count(number) for number in range(3)) >= 3
    for step in (7, 8):  # a resumed run draws the same
        (batch,) = next(iter(Loader(alone(shards), 1, 2, [(0, 1)], (16,), workers=0, start_step=step)))
        assert batch.condition.text[batch.keys.index("00000")].equal(drawn[step])
