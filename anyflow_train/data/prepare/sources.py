"""Sources of clips: a folder, a WebDataset of videos, or a list; or a list of prompts."""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from anyflow_train.data.index import Skipped
from anyflow_train.data.prepare.captions import FILES, CaptionError, CaptionReader
from anyflow_train.data.prepare.tables import SUFFIXES, read_rows, video_name
from anyflow_train.data.tar import Member, scan
from anyflow_train.errors import UserError
from anyflow_train.files import inside, regular
from anyflow_train.text import printable

VIDEOS = (
    *("mp4", "mov", "mkv", "webm", "avi", "m4v", "qt", "3gp", "3g2", "mj2", "ts", "m2ts", "mts", "mpg", "mpeg", "vob"),
    *("m1v", "m2v", "wmv", "asf", "flv", "f4v", "gif", "apng", "ogv", "mxf", "dv", "divx", "rm", "rmvb", "nut", "ivf"),
    *("y4m", "mjpeg", "mjpg", "h264", "264", "hevc", "h265", "265", "obu", "wtv", "vc1"),
)
PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
TARS = (".tar", ".tar.gz", ".tgz")
# Lists with these names describe the videos of the folder in which they are.
LISTS = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "videos2caption.json")


@dataclass(frozen=True)
class Blob:
    """A file or a part of a file.

    offset, size: in bytes; size None means the whole file.
    time: time of the part in seconds.
    """

    path: Path
    offset: int = 0
    size: int | None = None
    time: int = 0

    def stamp(self) -> tuple[int | None, int | None]:
        """Return size in bytes and time of the last change in ns, by which a change is noticed; None without a file."""
        if self.size is not None:
            return self.size, self.time * 10**9
        try:
            found = self.path.stat()
        except OSError:
            return None, None
        return found.st_size, found.st_mtime_ns

    def read(self) -> bytes:
        """Read the bytes. Raises OSError, also if the path is not that of a regular file."""
        with open(regular(self.path), "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)

    def seekable(self) -> Path | BinaryIO:
        """Return an input for a video reader: the path of the file, or the bytes of the part. Raises OSError."""
        return regular(self.path) if self.size is None else io.BytesIO(self.read())


@dataclass(frozen=True)
class CaptionFile:
    """A `.txt` or `.json` file of captions. kind: its extension. name: its name, for warnings."""

    blob: Blob
    kind: str
    name: str
    reader: CaptionReader = field(default_factory=CaptionReader)

    def read(self) -> tuple[str, ...]:
        """Read the captions. Raises OSError or CaptionError."""
        return self.reader.from_file(self.blob.read(), self.kind, self.name)


@dataclass(frozen=True)
class Gone:
    """In place of a caption: the clip was planned by an earlier job, and is not in the source any more."""

    def read(self) -> tuple[str, ...]:
        """Raise CaptionError."""
        raise CaptionError("gone from the source")


@dataclass(frozen=True)
class Clip:
    """A clip before it is encoded.

    Attributes:
        key: unique name without dots, as WebDataset requires.
        video: the video file; None for a prompt without video.
        caption: the texts, or their file.
    """

    key: str
    video: Blob | None
    caption: tuple[str, ...] | CaptionFile | Gone

    def read_captions(self) -> tuple[str, ...]:
        """Read the captions, without surrounding white space and empty ones. Raises OSError or CaptionError."""
        return self.caption if isinstance(self.caption, tuple) else self.caption.read()


@dataclass(frozen=True)
class Source:
    """All clips in a fixed order, the clips that could not be listed, and what else is there.

    Attributes:
        clips: all clips.
        problems: clips, or tars of clips, that cannot be used, with the reasons.
        unused: number of other files by extension; folders and links that were not followed, by name.
        unpacked: temporary folder of tars that were compressed; it goes with this object.
    """

    clips: tuple[Clip, ...]
    problems: tuple[Skipped, ...] = ()
    unused: Mapping[str, int] = field(default_factory=dict)
    unpacked: tempfile.TemporaryDirectory[str] | None = None


def list_clips(source: str, reader: CaptionReader | None = None, pictures: bool = False) -> Source:
    """List a folder of videos, a tar or a folder of tars (WebDataset), or a list of videos.

    Args:
        source: the folder or file.
        reader: reads captions and lists.
        pictures: whether pictures are clips of one frame, except next to a video of the same name.

    Raises:
        UserError: the source does not exist, has another format, or contains no clips; or a list in it is broken.
    """
    path, reader = Path(source).expanduser(), reader or CaptionReader()
    kinds = (*VIDEOS, *PICTURES) if pictures else VIDEOS
    if _is_tar(path) and path.is_file():
        found = _from_tars([path], reader, kinds)
    elif path.suffix.lower() in SUFFIXES and path.is_file():
        found = _from_list(path, reader)
    elif path.is_dir():
        found = _from_folder(path, reader, kinds)
    else:
        lists = ", ".join((*TARS, *SUFFIXES))
        problem = f"is not a folder, and not a file of type {lists}" if path.exists() else "does not exist"
        raise UserError("source", f"'{source}' {problem}")
    if not found.clips:
        there = f"; it holds {format_counts(found.unused)}" if found.unused else ""
        there += "".join(f"; {problem.key}: {problem.reason}" for problem in found.problems[:1])
        if {f".{kind}" for kind in PICTURES} & found.unused.keys():
            there += "; pictures need a bucket of one frame, such as buckets=[1x480x832]"
        kinds = f"videos are files of type {', '.join(VIDEOS[:6])} or one of {len(VIDEOS) - 6} others"
        raise UserError("source", f"{source} holds no clip that can be used{there}; {kinds}")
    return replace(found, clips=tuple(_with_unique_keys(found.clips)))


def list_prompts(path: str, reader: CaptionReader | None = None) -> Source:
    """List a text file with one prompt per line, or a list with a column of captions; empty prompts are ignored.

    Raises:
        UserError: the file cannot be read, or there are no prompts.
    """
    file, reader = Path(path).expanduser(), reader or CaptionReader()
    try:
        if file.suffix.lower() in SUFFIXES and file.suffix.lower() != ".txt":
            prompts = [text for row in read_rows(file, reader, "prompts") for text in reader.from_row(row.values)]
        else:
            lines = reader.decode(regular(file).read_bytes(), path).splitlines()
            prompts = [text for line in lines for text in reader.from_value(line)]
    except OSError as error:
        raise UserError("prompts", f"'{path}' cannot be read: {error.strerror or error}") from None
    except CaptionError as error:
        raise UserError("prompts", f"{path} {error}") from None
    if not prompts:
        raise UserError("prompts", f"{path} holds no prompt; name a text file with one prompt per line")
    return Source(tuple(Clip(f"prompt-{number:08d}", None, (prompt,)) for number, prompt in enumerate(prompts)))


def format_counts(counts: Mapping[str, int], most: int = 8) -> str:
    """Format counts as `3 .pdf, 1 .docx`, the largest first, and at most `most` of them."""
    parts = [f"{count} {name}" for name, count in Counter(counts).most_common(most)]
    return ", ".join([*parts, *(["others"] if len(counts) > most else [])])


def _from_folder(root: Path, reader: CaptionReader, kinds: tuple[str, ...]) -> Source:
    files, unused = _walk(root)
    moving = {path.with_suffix("") for path in files if path.suffix[1:].lower() in VIDEOS}
    videos = [path for path in files if path.suffix[1:].lower() in kinds]
    videos = [path for path in videos if path.suffix[1:].lower() in VIDEOS or path.with_suffix("") not in moving]
    tars = [path for path in files if _is_tar(path)]
    if videos and tars:
        found = f"({videos[0].name}, {tars[0].name})"
        raise UserError("source", f"{root} holds both videos and tars {found}; name a folder with only one of them")
    lists = [path for path in files if path.name.lower() in LISTS and (not path.is_symlink() or _is_inside(root, path))]
    used = {*videos, *tars, *lists}
    present = {(path.with_suffix(""), path.suffix[1:].lower()): path for path in files}
    listed: dict[Path, list[dict[str, Any]]] = {}
    for path in lists:
        for row in read_rows(path, reader):
            listed.setdefault(_video_path(path, video_name(row, path)), []).append(row.values)
    clips: list[Clip] = []
    problems: list[Skipped] = []
    for video in [*videos, *sorted(listed.keys() - set(videos))]:
        key = path_key(os.path.relpath(video.with_suffix(""), root))
        candidates = (present.get((video.with_suffix(""), kind)) for kind in FILES)
        file = next((path for path in candidates if path is not None), None)
        used.update(() if file is None else (file,))
        if file is not None and file.is_symlink() and not _is_inside(root, file):
            # A text of another place must not get into shards that are shared. Of a video only the pictures are read.
            problems.append(Skipped(key, "caption is a link out of the folder"))
            continue
        try:
            caption = tuple(text for row in listed.get(video, ()) for text in reader.from_row(row))
        except CaptionError as error:
            problems.append(Skipped(key, str(error)))
            continue
        clips.append(Clip(key, Blob(video), caption or _caption_file(file, reader)))
    unused.update(path.suffix.lower() or "without extension" for path in files if path not in used)
    found = _from_tars(tars, reader, kinds) if tars else Source(tuple(clips), tuple(problems))
    return replace(found, unused=unused + Counter(found.unused))


def _walk(root: Path) -> tuple[list[Path], Counter[str]]:
    """List the files of a folder in order; and count hidden files, and folders that are not read, by name."""
    unused: Counter[str] = Counter()

    def name(path: str) -> str:
        return printable(os.path.relpath(path, root))

    def unreadable(error: OSError) -> None:
        unused[f"folder that cannot be read ({name(error.filename)})"] += 1

    names = []
    for folder, folders, files in os.walk(root, onerror=unreadable):
        links = [os.path.join(folder, inner) for inner in folders if os.path.islink(os.path.join(folder, inner))]
        unused.update(f"link to a folder ({name(link)})" for link in links)
        names += [os.path.join(folder, file) for file in files if not file.startswith(".")]
    return [Path(name) for name in sorted(names)], unused


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith(TARS)


def _is_inside(root: Path, path: Path) -> bool:
    try:
        inside(root, str(path.relative_to(root)))
    except OSError:
        return False
    return True


def _caption_file(path: Path | None, reader: CaptionReader) -> tuple[str, ...] | CaptionFile:
    return () if path is None else CaptionFile(Blob(path), path.suffix[1:].lower(), str(path), reader)


def _video_path(path: Path, name: str) -> Path:
    """Return the path of a video that a list names, relative to the list or to the folder `videos` next to it."""
    found = Path(os.path.normpath(path.parent / name))
    beside = Path(os.path.normpath(path.parent / "videos" / name))
    return beside if path.name.lower() == "videos2caption.json" and beside.exists() else found


def _from_tars(paths: list[Path], reader: CaptionReader, kinds: tuple[str, ...]) -> Source:
    clips: list[Clip] = []
    problems: list[Skipped] = []
    unused: Counter[str] = Counter()
    unpacked = tempfile.TemporaryDirectory() if any(path.suffix.lower() != ".tar" for path in paths) else None
    for number, path in enumerate(paths):
        stem, plain = re.sub(r"\.(tar|tar\.gz|tgz)$", "", path.name, flags=re.IGNORECASE), path
        if path.suffix.lower() != ".tar" and unpacked is not None:
            plain = Path(unpacked.name) / f"{number}.tar"
            if (reason := _unpack(path, plain)) is not None:
                problems.append(Skipped(printable(path.name), f"damaged tar, its end is missing: {printable(reason)}"))
        with open(regular(plain), "rb") as file:
            samples, damage = scan(file)
        if damage is not None and plain is path:
            reason = f"damaged tar, clips after the damage are missing: {printable(damage)}"
            problems.append(Skipped(printable(path.name), reason))
        for key, members in samples.items():
            if not key.endswith("/"):  # as those of hidden files do
                found, others = _from_sample(members, kinds)
                unused.update(others)
                for suffix, video, kind, text in found:
                    blob = text and Blob(plain, text.offset, text.size)
                    caption = () if blob is None else CaptionFile(blob, kind, f"{path.name}: {key}.{kind}", reader)
                    part = Blob(plain, video.offset, video.size, video.time)
                    clips.append(Clip(path_key(f"{stem}/{key}{suffix}"), part, caption))
    return Source(tuple(clips), tuple(problems), unused, unpacked)


def _from_sample(
    members: Mapping[str, Member], kinds: tuple[str, ...]
) -> tuple[list[tuple[str, Member, str, Member | None]], Counter[str]]:
    """Find the videos in a sample of a WebDataset, whose files are equal up to the first dot of their names.

    Returns:
        Suffix of the name (`.v1` of `a.v1.mp4`), video, kind of the caption file, and that file, of each video; and the
        number of other files by extension.
    """
    by_name = {tuple(extension.rpartition(".")[::2]): member for extension, member in members.items()}
    found = []
    used = set()
    for stem in dict.fromkeys(stem for stem, _ in by_name):
        video = next((kind for kind in kinds if (stem, kind) in by_name), None)
        if video is not None:
            places = [(name, kind) for name in dict.fromkeys((stem, "")) for kind in FILES]
            text = next((place for place in places if place in by_name), ("", ""))
            used |= {(stem, video), text}
            found.append((stem and f".{stem}", by_name[stem, video], text[1], by_name.get(text)))
    return found, Counter(f".{kind}" for stem, kind in by_name if (stem, kind) not in used)


def _unpack(path: Path, plain: Path) -> str | None:
    """Decompress a tar. Returns the damage that ended it early."""
    try:
        with gzip.open(regular(path)) as source, open(plain, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        return str(error)
    except OSError as error:
        raise UserError("source", f"{path} cannot be unpacked into {plain.parent}: {error.strerror or error}") from None
    return None


def _from_list(path: Path, reader: CaptionReader) -> Source:
    rows = [(row, video_name(row, path)) for row in read_rows(path, reader)]
    # Names of clips are public, so they show only what distinguishes absolute paths from each other.
    absolute = [os.path.dirname(name) for _, name in rows if os.path.isabs(name)]
    common = os.path.commonpath(absolute) if absolute else ""
    clips: list[Clip] = []
    problems: list[Skipped] = []
    for row, name in rows:
        video = _video_path(path, name)
        shown = os.path.relpath(name, common) if os.path.isabs(name) else name
        key = path_key(str(row.values.get("key") or Path(shown).with_suffix("")))
        try:
            caption = reader.from_row(row.values) if path.suffix.lower() != ".txt" else ()
        except CaptionError as error:
            problems.append(Skipped(key, f"{error} ({path.name} {row.place})"))
            continue
        clips.append(Clip(key, Blob(video), caption or _caption_file(_beside(video), reader)))
    return Source(tuple(clips), tuple(problems))


def _beside(video: Path) -> Path | None:
    """Find the caption file next to a video; not through a link, which may lead to a text that is not a caption."""
    places = (video.with_suffix(f".{kind}") for kind in FILES)
    return next((place for place in places if place.is_file() and not place.is_symlink()), None)


def path_key(name: str) -> str:
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
