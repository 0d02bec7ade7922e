"""Where clips come from: a folder, a WebDataset of videos, a JSONL or CSV list; or prompts alone."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from anyflow_train.data.captions import NAMES, parse_caption
from anyflow_train.data.index import Skipped
from anyflow_train.data.tar import Member, scan
from anyflow_train.errors import UserError

VIDEOS = ("mp4", "mov", "mkv", "webm", "avi", "m4v")
CAPTION_FILES = ("txt", "json")
VIDEO_COLUMNS = ("video", "path", "file", "file_name", "video_path")


@dataclass(frozen=True)
class Blob:
    """A file, or a part of one. size None is all of it."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Its bytes. Raises OSError."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)

    def seekable(self) -> Path | BinaryIO:
        """What a video reader opens: the file itself, or the part's bytes. Raises OSError."""
        return self.path if self.size is None else io.BytesIO(self.read())


@dataclass(frozen=True)
class Clip:
    """A clip before it is encoded.

    Attributes:
        key: its name, unique in the source, fit for a file in a WebDataset (no dots).
        video: None for a prompt without video.
        caption: the text, or the file that holds it; None if there is none.
    """

    key: str
    video: Blob | None
    caption: str | Blob | None

    def read_caption(self) -> str:
        """The caption, stripped; empty if there is none. Raises OSError."""
        if isinstance(self.caption, Blob):
            return parse_caption(self.caption.read())
        return (self.caption or "").strip()


@dataclass(frozen=True)
class Source:
    """All clips in a fixed order, and what could not even be listed."""

    clips: tuple[Clip, ...]
    problems: tuple[Skipped, ...] = ()


def list_clips(source: str) -> Source:
    """List a folder of videos, a tar or a folder of tars (WebDataset), or a `.jsonl`/`.csv` manifest.

    Raises UserError if there is no such thing, or no clip in it.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".csv") and path.is_file():
        found = Source(tuple(_from_table(path)))
    elif path.suffix == ".tar" and path.is_file():
        found = _from_tars([path])
    elif path.is_dir():
        found = _from_folder(path)
    else:
        raise UserError("source", f"{source} is not a folder, a .tar, a .jsonl or a .csv file")
    if not found.clips:
        raise UserError("source", f"{source} holds no clip ({', '.join(VIDEOS)})")
    return Source(tuple(_with_unique_keys(found.clips)), found.problems)


def list_prompts(path: str) -> Source:
    """One prompt a line; empty lines count for nothing. Raises UserError if there is none."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("prompts", f"{path} cannot be read ({error}); a text file with one prompt a line") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError("prompts", f"{path} holds no prompt; a text file with one prompt a line")
    return Source(tuple(Clip(f"prompt-{number:08d}", None, prompt) for number, prompt in enumerate(prompts)))


def validation_prompts(prompts: tuple[str, ...]) -> tuple[str, ...]:
    """The prompts themselves, or the lines of the one `.txt` file named. Raises UserError if it cannot be read."""
    if len(prompts) != 1 or not prompts[0].endswith(".txt"):
        return prompts
    try:
        lines = Path(prompts[0]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("validation_prompts", f"{prompts[0]} cannot be read: {error}") from None
    return tuple(line.strip() for line in lines if line.strip())


def _from_folder(root: Path) -> Source:
    names = sorted(os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names)
    files = [Path(name) for name in names if not Path(name).name.startswith(".")]
    videos = [path for path in files if path.suffix[1:].lower() in VIDEOS]
    tars = [path for path in files if path.suffix == ".tar"]
    if videos and tars:
        raise UserError(
            "source", f"{root} holds both videos and tars ({videos[0].name}, {tars[0].name}): name one kind"
        )
    if tars:
        return _from_tars(tars)
    present = set(files)
    clips = []
    for video in videos:
        candidates = [video.with_suffix(f".{extension}") for extension in CAPTION_FILES]
        caption = next((Blob(path) for path in candidates if path in present), None)
        clips.append(Clip(_key(str(video.relative_to(root).with_suffix(""))), Blob(video), caption))
    return Source(tuple(clips))


def _from_tars(paths: list[Path]) -> Source:
    clips: list[Clip] = []
    problems: list[Skipped] = []
    for path in paths:
        with open(path, "rb") as file:
            listing = scan(file)
        if listing.problem is not None:
            problems.append(Skipped(path.name, f"damaged tar, clips after the damage are lost: {listing.problem}"))
        samples: dict[str, dict[str, Member]] = {}
        for member in listing.members:
            samples.setdefault(member.key, {})[member.extension] = member
        for key, members in samples.items():
            video = next((members[extension] for extension in VIDEOS if extension in members), None)
            if video is not None:
                caption = next((members[extension] for extension in CAPTION_FILES if extension in members), None)
                blob = None if caption is None else Blob(path, caption.offset, caption.size)
                clips.append(Clip(_key(f"{path.stem}/{key}"), Blob(path, video.offset, video.size), blob))
    return Source(tuple(clips), tuple(problems))


def _from_table(path: Path) -> Iterator[Clip]:
    for number, row in _rows(path):
        where = f"{path} line {number}"
        video = next((str(row[name]) for name in VIDEO_COLUMNS if row.get(name)), None)
        if video is None:
            raise UserError("source", f"{where} names no video; give one of the columns {', '.join(VIDEO_COLUMNS)}")
        caption = next((str(row[name]) for name in NAMES if row.get(name)), None)
        key = str(row.get("key") or Path(video).with_suffix(""))
        yield Clip(_key(key), Blob(path.parent / video), caption)


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            reader = csv.DictReader(file)
            for row in reader:
                yield reader.line_num, row
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError("source", f"{path} line {number} is not a JSON object")
            yield number, row


def _key(name: str) -> str:
    """A name fit for a tar and for WebDataset, which cuts names at the first dot."""
    return re.sub(r"[^\w/=+-]", "_", name.replace(os.sep, "/")).strip("/")


def _with_unique_keys(clips: Iterable[Clip]) -> Iterator[Clip]:
    """Clips that would share a name (`a.mp4` and `a.mov`, a video listed twice) get a number."""
    taken: set[str] = set()
    for clip in clips:
        key, number = clip.key, 1
        while key in taken:
            number += 1
            key = f"{clip.key}-{number}"
        taken.add(key)
        yield clip if key == clip.key else Clip(key, clip.video, clip.caption)
