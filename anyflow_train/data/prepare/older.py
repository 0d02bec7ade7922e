"""Folders of shards that versions without a ledger wrote: the ledger is made from what they hold."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from anyflow_train.data.captions import parse_captions
from anyflow_train.data.index import SampleEntry, Skipped, index_name, parse_index
from anyflow_train.data.manifest import MANIFEST, parse_manifest
from anyflow_train.data.prepare.growth import Wanted, next_generation
from anyflow_train.data.prepare.ledger import ClipRecord, FolderPrompts, Generation, Ledger, ShardRecord, digest
from anyflow_train.data.prepare.sources import Source
from anyflow_train.errors import UserError
from anyflow_train.files import open_inside, parse_json, read_inside

SETTINGS = "prepare.json"
"""File of the settings. In a folder of an older version they contain a digest of the list of clips."""
SKIPPED = "skipped.jsonl"


def adopt(folder: Path, source: Source, wanted: Wanted) -> Generation | None:
    """Make the first generation of a folder without a ledger. Returns None if the folder is new.

    Raises:
        UserError: the folder is unfinished, and the clips are not those with which it was started.
    """
    saved = parse_json(read_inside(folder, SETTINGS))
    if "source" not in saved:
        return None
    if (folder / MANIFEST).exists():
        return _from_shards(folder, wanted)
    if saved["source"] != _listing_digest(source):
        problem = f"the list of clips has changed since {folder} was started; change it back, or name another `out`"
        raise UserError("source", problem)
    return next_generation(Ledger(folder, ()), wanted, retry=False)


def _from_shards(folder: Path, wanted: Wanted) -> Generation:
    """Take videos as unchanged, as their sizes and times are unknown; and captions as the shards hold them."""
    manifest = parse_manifest(read_inside(folder, MANIFEST), str(folder / MANIFEST))
    unknown = ClipRecord("", None, None, "")
    shards: list[ShardRecord] = []
    listed = set[str]()
    for shard in manifest.shards:
        index = parse_index(read_inside(folder, index_name(shard.name)))
        with open(open_inside(folder, shard.name), "rb") as file:
            captions = {entry.key: _captions(file.fileno(), entry) for entry in index.entries}
        captions |= dict.fromkeys((one.key for one in index.skipped), "")
        records = ((key, wanted.records.get(key, unknown), text) for key, text in captions.items())
        clips = (now._replace(key=key, caption=text or now.caption) for key, now, text in records)
        shards.append(ShardRecord(shard.name, tuple(clips)))
        listed |= captions.keys()
    lines = read_inside(folder, SKIPPED).decode().splitlines() if (folder / SKIPPED).exists() else []
    problems = tuple(Skipped(**parse_json(line)) for line in lines)
    prompts = FolderPrompts(manifest.negative_prompt, manifest.validation_prompts)
    return Generation(0, prompts, tuple(shards), tuple(one for one in problems if one.key not in listed))


def _captions(descriptor: int, entry: SampleEntry) -> str:
    return digest(parse_captions(os.pread(descriptor, entry.caption_size, entry.caption_offset)))


def _listing_digest(source: Source) -> str:
    found = hashlib.sha256()
    for clip in source.clips:
        caption = list(clip.caption) if isinstance(clip.caption, tuple) else []
        caption = caption if len(caption) > 1 else "".join(caption)
        found.update(json.dumps([clip.key, clip.video is not None, caption]).encode())
    found.update(json.dumps([[problem.key, problem.reason] for problem in source.problems]).encode())
    return f"{len(source.clips)} clips, {found.hexdigest()[:16]}"
