import json
import tarfile
from pathlib import Path

import pytest
import webdataset

from anyflow_train.data.captions import read_prompts
from anyflow_train.data.prepare.sources import list_clips, list_prompts
from anyflow_train.errors import UserError


def touch(path: Path, content: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_a_folder_gives_sorted_clips_with_their_captions(tmp_path: Path) -> None:
    touch(tmp_path / "b" / "two.v1.mp4")
    touch(tmp_path / "b" / "two.v1.json", json.dumps({"caption": " a json caption "}))
    touch(tmp_path / "a.MOV")
    touch(tmp_path / "a.txt", "a text\n")
    touch(tmp_path / "c.webm")
    touch(tmp_path / ".hidden.mp4")
    clips = list_clips(str(tmp_path)).clips
    assert [clip.key for clip in clips] == ["a", "b/two_v1", "c"]
    assert [clip.read_captions() for clip in clips] == [("a text",), ("a json caption",), ()]


def test_names_that_collide_get_numbers(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mov", "x.y.mp4", "x_y.mp4"):
        touch(tmp_path / name)
    assert [clip.key for clip in list_clips(str(tmp_path)).clips] == ["a", "a-2", "x_y", "x_y-2"]


def test_a_webdataset_of_clips(tmp_path: Path) -> None:
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"clips-{number}.tar")) as writer:
            writer.write({"__key__": "one", "mp4": b"video", "txt": f"caption {number}"})
            writer.write({"__key__": "two", "mp4": b"video two", "json": {"text": "from json"}})
    clips = list_clips(str(tmp_path)).clips
    assert [clip.key for clip in clips] == ["clips-0/one", "clips-0/two", "clips-1/one", "clips-1/two"]
    found = [clip.read_captions() for clip in clips]
    assert found == [("caption 0",), ("from json",), ("caption 1",), ("from json",)]
    assert clips[1].video is not None
    assert clips[1].video.read() == b"video two"
    assert len(list_clips(str(tmp_path / "clips-1.tar")).clips) == 2


def test_a_truncated_webdataset_is_named(tmp_path: Path) -> None:
    path = tmp_path / "clips.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(3):
            writer.write({"__key__": f"{number}", "mp4": b"v" * 2000})
    with tarfile.open(path) as archive:
        cut = archive.getmember("2.mp4").offset_data + 100
    path.write_bytes(path.read_bytes()[:cut])
    source = list_clips(str(path))
    assert [clip.key for clip in source.clips] == ["clips/0", "clips/1"]
    assert [problem.key for problem in source.problems] == ["clips.tar"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_table_names_videos_beside_it(tmp_path: Path, suffix: str) -> None:
    if suffix == "jsonl":
        rows = [{"video": "v/a.mp4", "caption": "one, two"}, {"video": "v/a.mp4", "text": "again"}, {"path": "b.mp4"}]
        text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    else:
        text = 'video,caption\nv/a.mp4,"one, two"\nv/a.mp4,again\nb.mp4,\n'
    clips = list_clips(str(touch(tmp_path / f"list.{suffix}", text))).clips
    assert [clip.key for clip in clips] == ["v/a", "v/a-2", "b"]
    assert [clip.read_captions() for clip in clips] == [("one, two",), ("again",), ()]
    assert clips[0].video is not None
    assert clips[0].video.path == tmp_path / "v" / "a.mp4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"video": "a.mp4"}\nnot json\n', "line 2 is not a JSON object"),
        ('{"caption": "no video"}\n', "line 1 names no video"),
        ("", "holds no clip"),
    ],
)
def test_a_bad_table_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list_clips(str(touch(tmp_path / "list.jsonl", text)))


def test_nothing_to_prepare_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere' does not exist"):
        list_clips(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="doc' is not a folder, and not a file of type"):
        list_clips(str(touch(tmp_path / "list.doc")))
    (tmp_path / "list.doc").unlink()
    with pytest.raises(UserError, match="holds no clip"):
        list_clips(str(tmp_path))
    touch(tmp_path / "a.mp4")
    touch(tmp_path / "b.tar")
    with pytest.raises(UserError, match="both videos and tars"):
        list_clips(str(tmp_path))


def test_prompts_are_lines(tmp_path: Path) -> None:
    path = touch(tmp_path / "prompts.txt", "one\n\n  two \n")
    assert [clip.read_captions() for clip in list_prompts(str(path)).clips] == [("one",), ("two",)]
    assert read_prompts((str(path),), "validation_prompts") == ("one", "two")
    assert read_prompts(("one", "b.txt"), "validation_prompts") == ("one", "b.txt")
    with pytest.raises(UserError, match="holds no prompt"):
        list_prompts(str(touch(tmp_path / "empty.txt", "\n")))
    with pytest.raises(UserError, match="validation_prompts"):
        read_prompts((str(tmp_path / "none.txt"),), "validation_prompts")
