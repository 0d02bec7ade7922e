"""Sources of clips: a folder, a WebDataset of videos, a JSONL or CSV list; or a list of prompts."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import TypeAdapter, ValidationError

from anyflow_train.data.captions import NAMES, parse_caption, read_lines
from anyflow_train.data.index import Skipped
from anyflow_train.data.tar import scan
from anyflow_train.errors import UserError
from anyflow_train.files import inside, regular
from anyflow_train.text import printable

VIDEOS = ("mp4", "mov", "mkv", "webm", "avi", "m4v")
CAPTION_FILES = ("txt", "json")
JSON_OBJECT = TypeAdapter(dict[str, object])
VIDEO_COLUMNS = ("video", "path", "file", "file_name", "video_path")


@dataclass(frozen=True)
class Blob:
    """A file or a part of a file. offset and size are in bytes; size None means the whole file."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Read the bytes. Raises OSError, also if the path is not that of a regular file."""
        with open(regular(self.path), "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)

    def seekable(self) -> Path | BinaryIO:
        """Return an input for a video reader: the path of the file, or the bytes of the part. Raises OSError."""
        return regular(self.path) if self.size is None else io.BytesIO(self.read())


@dataclass(frozen=True)
class Clip:
    """A clip before it is encoded.

    Attributes:
        key: unique name without dots, as WebDataset requires.
        video: the video file; None for a prompt without video.
        caption: the text or its file; None if there is no caption.
    """

    key: str
    video: Blob | None
    caption: str | Blob | None

    def read_caption(self) -> str:
        """Read the caption without surrounding white space; empty if there is none. Raises OSError."""
        if isinstance(self.caption, Blob):
            return parse_caption(self.caption.read())
        return (self.caption or "").strip()


@dataclass(frozen=True)
class Source:
    """All clips in a fixed order, and the files that could not be listed."""

    clips: tuple[Clip, ...]
    problems: tuple[Skipped, ...] = ()


def list_clips(source: str) -> Source:
    """List a folder of videos, a tar or a folder of tars (WebDataset), or a `.jsonl`/`.csv` manifest.

    Raises:
        UserError: the source does not exist, has another format, or contains no clips.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".csv") and path.is_file():
        found = Source(tuple(_from_table(path)))
    elif path.suffix == ".tar" and path.is_file():
        found = _from_tars([path])
    elif path.is_dir():
        found = _from_folder(path)
    else:
        raise UserError("source", f"{source} is not a folder, and not a .tar, .jsonl or .csv file")
    if not found.clips:
        raise UserError("source", f"{source} holds no clip; videos are files of type {', '.join(VIDEOS)}")
    return Source(tuple(_with_unique_keys(found.clips)), found.problems)


def list_prompts(path: str) -> Source:
    """List a text file with one prompt per line; empty lines are ignored. Raises UserError if there are no prompts."""
    prompts = [line for line in read_lines(path, "prompts") if line]
    if not prompts:
        raise UserError("prompts", f"{path} holds no prompt; name a text file with one prompt per line")
    return Source(tuple(Clip(f"prompt-{number:08d}", None, prompt) for number, prompt in enumerate(prompts)))


def validation_prompts(prompts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the prompts, or the lines of a single `.txt` file. Raises UserError if the file cannot be read."""
    if len(prompts) != 1 or not prompts[0].endswith(".txt"):
        return prompts
    return tuple(line for line in read_lines(prompts[0], "validation_prompts") if line)


def _from_folder(root: Path) -> Source:
    names = sorted(os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names)
    files = [Path(name) for name in names if not Path(name).name.startswith(".")]
    videos = [path for path in files if path.suffix[1:].lower() in VIDEOS]
    tars = [path for path in files if path.suffix == ".tar"]
    if videos and tars:
        found = f"({videos[0].name}, {tars[0].name})"
        raise UserError("source", f"{root} holds both videos and tars {found}; name a folder with only one of them")
    if tars:
        return _from_tars(tars)
    present = set(files)
    clips, problems = [], []
    for video in videos:
        candidates = [video.with_suffix(f".{extension}") for extension in CAPTION_FILES]
        caption = next((path for path in candidates if path in present), None)
        key = _key(str(video.relative_to(root).with_suffix("")))
        if caption is not None and caption.is_symlink() and not _is_inside(root, caption):
            # A text of another place must not get into shards that are shared. Of a video only the pictures are read.
            problems.append(Skipped(key, "caption is a link out of the folder"))
            continue
        clips.append(Clip(key, Blob(video), None if caption is None else Blob(caption)))
    return Source(tuple(clips), tuple(problems))


def _is_inside(root: Path, path: Path) -> bool:
    try:
        inside(root, str(path.relative_to(root)))
    except OSError:
        return False
    return True


def _from_tars(paths: list[Path]) -> Source:
    clips: list[Clip] = []
    problems: list[Skipped] = []
    for path in paths:
        with open(regular(path), "rb") as file:
            samples, damage = scan(file)
        if damage is not None:
            reason = f"damaged tar, clips after the damage are missing: {printable(damage)}"
            problems.append(Skipped(printable(path.name), reason))
        for key, members in samples.items():
            video = next((members[extension] for extension in VIDEOS if extension in members), None)
            if video is not None:
                caption = next((members[extension] for extension in CAPTION_FILES if extension in members), None)
                blob = None if caption is None else Blob(path, caption.offset, caption.size)
                clips.append(Clip(_key(f"{path.stem}/{key}"), Blob(path, video.offset, video.size), blob))
    return Source(tuple(clips), tuple(problems))


def _from_table(path: Path) -> Iterator[Clip]:
    rows = list(_rows(path))
    # Names of clips are public, so they show only what distinguishes absolute paths from each other.
    places = [os.path.dirname(str(row[name])) for _, row in rows for name in VIDEO_COLUMNS if row.get(name)]
    absolute = [place for place in places if os.path.isabs(place)]
    common = os.path.commonpath(absolute) if absolute else ""
    for number, row in rows:
        where = f"{path} line {number}"
        video = next((str(row[name]) for name in VIDEO_COLUMNS if row.get(name)), None)
        if video is None:
            raise UserError("source", f"{where} names no video; add one of the columns {', '.join(VIDEO_COLUMNS)}")
        caption = next((str(row[name]) for name in NAMES if row.get(name)), None)
        name = os.path.relpath(video, common) if os.path.isabs(video) else video
        key = str(row.get("key") or Path(name).with_suffix(""))
        yield Clip(_key(key), Blob(path.parent / video), caption)


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            reader = csv.DictReader(file)
            for row in reader:
                yield reader.line_num, row
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, JSON_OBJECT.validate_json(line)
                except ValidationError:
                    raise UserError("source", f"{path} line {number} is not a JSON object") from None


def _key(name: str) -> str:
    """Replace characters that a tar or WebDataset cannot have in a key; WebDataset cuts names at the first dot."""
    return re.sub(r"[^\w/=+-]", "_", name.replace(os.sep, "/")).strip("/")


def _with_unique_keys(clips: Iterable[Clip]) -> Iterator[Clip]:
    """Add a number to the key of clips that share it (`a.mp4` and `a.mov`, or a video that is listed twice)."""
    taken: set[str] = set()
    for clip in clips:
        key, number = clip.key, 1
        while key in taken:
            number += 1
            key = f"{clip.key}-{number}"
        taken.add(key)
        yield clip if key == clip.key else Clip(key, clip.video, clip.caption)
