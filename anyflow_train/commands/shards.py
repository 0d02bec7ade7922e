"""`anyflow shards`: what a folder of shards holds, and which clips are in it twice or in the held-out shards too."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from anyflow_train.config.commands import ShardsConfig
from anyflow_train.config.paths import resource
from anyflow_train.data.remote import is_remote
from anyflow_train.data.shards import BadSampleError, Sample, ShardSet
from anyflow_train.devices import DTYPES, pick_device
from anyflow_train.errors import UserError
from anyflow_train.evaluation.video import Grid, draw_grid, to_frames
from anyflow_train.files import atomic_file, check_own
from anyflow_train.models.codec import Codec
from anyflow_train.text import MOST_NAMED, printable, some

MOST_READ = 64
"""Samples of which texts are counted if not all samples are read."""
EQUAL = 0.02
"""Difference of latents, per number, below which clips count as equal."""
COLUMNS = 4
LABEL = 60
MARK = ("Software", "anyflow contact sheet")
"""Text in the PNG of a contact sheet, by which an earlier one is known."""
MIB = 2**20


def run(config: ShardsConfig) -> int:
    """Print what the shards hold, and write the contact sheet.

    Returns:
        0, or 1 if samples cannot be read.

    Raises:
        UserError: the folder holds no shards, or the contact sheet cannot be made.
    """
    shards = ShardSet.open(config.folder).of_all_sizes()
    print("\n".join(_facts(shards)))
    bad: list[str] = []
    step = 1 if config.verify else max(1, len(shards) // MOST_READ)
    hashes: dict[int, str] = {}
    lengths, captions = list[int](), Counter[str]()
    for index in range(0, len(shards), step):
        try:
            sample = shards.read(index)
        except BadSampleError as error:
            bad.append(str(error))
            continue
        hashes[index] = _hash(sample)
        lengths += [len(sample.text), *(len(text) for text, _ in sample.others)]
        captions.update([sample.caption, *(caption for _, caption in sample.others)])
    if lengths:
        read = "all" if step == 1 else f"{len(hashes)} of {len(shards)}"
        spread = f"{min(lengths)} to {max(lengths)} tokens, median {statistics.median(lengths):g}"
        print(f"texts of {read} samples: {len(captions)} different captions, {spread}")
        print("\n".join(f"  {count} x {printable(text[:100])}" for text, count in captions.most_common(MOST_NAMED)))
    print("\n".join(_equal_clips(shards, hashes)))
    if config.held_out is not None:
        print("\n".join(_in_both(shards, ShardSet.open(config.held_out).of_all_sizes(), hashes)))
    for line in bad[:MOST_NAMED]:
        print(f"bad sample: {line}")
    checked = f"{len(bad)} of {len(range(0, len(shards), step))} samples that were read are bad"
    print(checked if bad or config.verify else f"{checked}; verify=true reads all")
    if config.pictures and shards.manifest.kind == "video":
        _write_contact_sheet(config, shards)
    return 1 if bad else 0


def _facts(shards: ShardSet) -> Iterator[str]:
    facts, names = shards.manifest, shards.manifest.shards
    size = f", {sum(shard.bytes or 0 for shard in names) / MIB:.1f} MiB" if names[0].bytes else ""
    yield f"{shards.location}: {len(shards)} samples in {len(names)} shards{size}"
    if facts.kind == "video":
        for size in facts.clip_sizes:
            one = shards.of_size(size)
            clips = f"{size.frames} frames of {size.height}x{size.width} pixels at {facts.fps or 0:g} fps"
            count = f"{len(one)} " if facts.buckets else ""
            yield f"{count}clips: {clips}; latents {one.manifest.latent_shape} in {facts.latent_dtype}"
    else:
        yield "prompts without video"
    longest = "unknown" if facts.longest_text is None else f"{facts.longest_text} tokens"
    yield f"longest text: {longest}; {facts.text_dim} numbers per token"
    yield f"codec: {facts.codec.source} (VAE {facts.codec.vae}, text encoder {facts.codec.text_encoder})"
    if shards.generations > 1:
        dropped = sum(end - start for ranges in facts.dropped.values() for start, end in ranges)
        yield f"grown: {shards.generations} states; {dropped} samples were replaced by later ones"
    if facts.clips is not None:
        yield f"source: {facts.clips} clips, {facts.skipped} of them skipped"


def _equal_clips(shards: ShardSet, hashes: dict[int, str]) -> Iterator[str]:
    groups: dict[str, list[int]] = {}
    for indices in _candidates([shards]).values():
        for _, index in indices if len(indices) > 1 else ():
            hashes.setdefault(index, _hash_at(shards, index))
    for index, found in sorted(hashes.items()):
        groups.setdefault(found, []).append(index)
    equal = [group for group in groups.values() if len(group) > 1]
    count = sum(len(group) for group in equal)
    named = (" = ".join(some(map(shards.key, group))) for group in equal)
    yield f"equal clips: {count}" + (f" in {len(equal)} groups: {'; '.join(some(named))}" if equal else "")


def _in_both(shards: ShardSet, held_out: ShardSet, hashes: Mapping[int, str]) -> Iterator[str]:
    """Compare all held-out samples with those whose hash is known, and with those of the same checksum."""
    known = {found: index for index, found in hashes.items()}
    for pairs in _candidates([shards, held_out]).values():
        if {number for number, _ in pairs} == {0, 1}:
            known |= {_hash_at(shards, index): index for number, index in pairs if number == 0}
    others = ((index, _hash_at(held_out, index)) for index in range(len(held_out)))
    both = [(known[found], index) for index, found in others if found in known]
    named = ", ".join(some(f"{shards.key(ours)} = {held_out.key(theirs)}" for ours, theirs in both))
    yield f"clips that are in {held_out.location} too: {len(both)}" + (f" ({named})" if both else "")


def _candidates(sets: Iterable[ShardSet]) -> dict[tuple[int | None, int], list[tuple[int, int]]]:
    """Group samples by checksum and size of their bytes, as the index files hold them. Values: (set, index)."""
    found: dict[tuple[int | None, int], list[tuple[int, int]]] = {}
    for number, shards in enumerate(sets):
        for index in range(len(shards)):
            try:
                entry = shards.entry(index)
            except BadSampleError:
                continue
            if entry.crc32 is not None:
                found.setdefault((entry.crc32, entry.size), []).append((number, index))
    return found


def _hash_at(shards: ShardSet, index: int) -> str:
    try:
        return _hash(shards.read(index))
    except BadSampleError:
        return f"bad {shards.location} {index}"


def _hash(sample: Sample) -> str:
    """Shorten the latents, or the caption of a prompt without video.

    Latents of equal clips differ in their last digits if the VAE encoded them in other batches.
    """
    if sample.latents is None:
        return hashlib.sha256(sample.caption.encode()).hexdigest()
    found = _directions(sample.latents.numel()) @ sample.latents.float().flatten() / EQUAL
    return str(found.round().int().tolist())


@lru_cache(maxsize=4)
def _directions(size: int) -> torch.Tensor:
    """Draw directions (8, size), along which different latents differ by about their distance per number."""
    return torch.randn(8, size, generator=torch.Generator().manual_seed(0)) / size**0.5


def _write_contact_sheet(config: ShardsConfig, shards: ShardSet) -> None:
    """Decode the middle frames of some samples, evenly spaced, into one PNG."""
    folder = Path() if is_remote(config.folder) else Path(config.folder)
    path = Path(config.out or folder / "contact_sheet.png").expanduser()
    check_contact_sheet(path)
    source = config.codec or shards.manifest.codec.source
    shipped = resource("assets") / source
    try:
        source = str(shipped) if not Path(source).expanduser().exists() and shipped.is_dir() else source
        codec = Codec.load(source, pick_device(config.device, config.threads), DTYPES["fp32"])
    except UserError as error:
        print(f"no contact sheet, as the codec cannot be loaded; set codec=FOLDER or pictures=0 ({error})")
        return
    count = min(config.pictures, len(shards))
    pictures, labels = [], []
    for index in (number * len(shards) // count for number in range(count)):
        try:
            sample = shards.read(index)
        except BadSampleError:
            continue
        if sample.latents is not None:
            frames = to_frames(codec.decode_video(sample.latents.float()[None])[0])
            pictures.append(frames[len(frames) // 2])
            labels.append(f"{sample.key}: {sample.caption}"[:LABEL])
    write_contact_sheet(path, pictures, labels)
    print(f"contact sheet of {len(pictures)} samples: {path}")


def check_contact_sheet(path: Path) -> None:
    """Check that a contact sheet can be written there. Raises UserError also if a file that is none would be lost."""
    check_own(path.parent, MARK[1], path.name)


def write_contact_sheet(path: Path, pictures: list[np.ndarray], labels: list[str]) -> None:
    """Write pictures (H, W, 3) with their labels as a PNG. Smaller ones than the largest get a margin."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    blank = np.full((height, width, 3), 255, np.uint8)
    pictures = [_centred(picture, blank) for picture in pictures]
    rows = [slice(start, start + COLUMNS) for start in range(0, len(pictures), COLUMNS)]
    cells = [[one[None] for one in pictures[row]] for row in rows]
    cells[-1] += [blank[None]] * (COLUMNS - len(cells[-1])) if len(rows) > 1 else []
    names = ["\n".join(labels[row]) for row in rows]
    sheet = draw_grid(Grid(names, [""] * len(cells[0]), cells, 1.0), least=128, most=224)[0]
    check_contact_sheet(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = PngInfo()
    mark.add_text(*MARK)
    with atomic_file(path) as file:
        Image.fromarray(sheet).save(file, "PNG", pnginfo=mark)


def _centred(picture: np.ndarray, blank: np.ndarray) -> np.ndarray:
    top, left = ((whole - part) // 2 for whole, part in zip(blank.shape[:2], picture.shape[:2], strict=True))
    found = blank.copy()
    found[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return found
