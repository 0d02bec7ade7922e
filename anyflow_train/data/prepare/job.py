"""The plan of `anyflow prepare`: its clips, shards and settings."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from anyflow_train.config.commands import PrepareConfig
from anyflow_train.data.captions import read_prompts
from anyflow_train.data.fingerprint import NAMED, component_fingerprint, known
from anyflow_train.data.index import ShardIndex, Skipped, index_name, parse_index
from anyflow_train.data.prepare.captions import CaptionReader
from anyflow_train.data.prepare.sources import Clip, Source, list_clips, list_prompts
from anyflow_train.text import public_name

# These keys do not change the shards (`batch` changes only rounding). `source` and `codec` enter as hashes instead.
FREE_KEYS = {"out", "source", "prompts", "codec", "device", "threads", "batch"}
# These keys are newer than some folders. They are written only if they are set, so that such a folder can go on.
LATER_KEYS = {"hdr", "caption_key", "encoding"}


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: a fixed range of the source's clips, usable or not."""

    name: str
    clips: tuple[Clip, ...]

    @property
    def text_name(self) -> str:
        """Temporary file of the shard's text embeddings."""
        return "." + self.name.removesuffix(".tar") + ".text.safetensors"


@dataclass(frozen=True)
class PreparePlan:
    """The whole job.

    Attributes:
        folder: folder of the shards.
        source: all clips.
        shards: all shards, in order; they do not depend on the number of processes.
        settings: settings that change the shards, as written to `prepare.json`.
    """

    folder: Path
    source: Source
    shards: tuple[ShardPlan, ...]
    settings: dict[str, object]

    def index(self, shard: ShardPlan) -> ShardIndex:
        """Read the index of a finished shard."""
        return parse_index((self.folder / index_name(shard.name)).read_bytes())

    def unfinished(self) -> list[ShardPlan]:
        """List the shards that are not complete. The index is written last, so a shard with an index is complete."""
        present = {entry.name for entry in self.folder.iterdir()}
        return [shard for shard in self.shards if not {shard.name, index_name(shard.name)} <= present]


def make_plan(config: PrepareConfig) -> PreparePlan:
    """List the clips and divide them into shards. Raises UserError if there are none."""
    reader = CaptionReader(config.caption_key, config.encoding)
    prompts = config.prompts
    source = list_clips(config.source or "", reader) if prompts is None else list_prompts(prompts, reader)
    size = config.samples_per_shard
    runs = [source.clips[start : start + size] for start in range(0, len(source.clips), size)]
    shards = tuple(ShardPlan(f"shard-{number:06d}.tar", run) for number, run in enumerate(runs))
    settings: dict[str, object] = {
        key: value
        for key, value in config.model_dump(mode="json").items()
        if key not in FREE_KEYS and (key not in LATER_KEYS or value != PrepareConfig.model_fields[key].default)
    }
    settings["validation_prompts"] = list(read_prompts(config.validation_prompts, "validation_prompts"))
    settings["source"] = _listing_digest(source)
    settings["codec"] = {part: public_fingerprint(config.codec, part) for part in ("vae", "text_encoder")}
    return PreparePlan(Path(config.out), source, shards, settings)


def public_fingerprint(source: str, part: str) -> str:
    """Return the fingerprint of a component of a codec, for files that are shared: without local folders."""
    found = component_fingerprint(source, part)
    return found if known(found) else NAMED + public_name(source)


def _listing_digest(source: Source) -> str:
    digest = hashlib.sha256()
    for clip in source.clips:
        caption = list(clip.caption) if isinstance(clip.caption, tuple) else []
        caption = caption if len(caption) > 1 else "".join(caption)
        digest.update(json.dumps([clip.key, clip.video is not None, caption]).encode())
    digest.update(json.dumps([[problem.key, problem.reason] for problem in source.problems]).encode())
    return f"{len(source.clips)} clips, {digest.hexdigest()[:16]}"


def read_all_skipped(plan: PreparePlan) -> list[Skipped]:
    """List all skipped clips of finished shards, and the clips that could not be listed."""
    return [*plan.source.problems, *(entry for shard in plan.shards for entry in plan.index(shard).skipped)]
