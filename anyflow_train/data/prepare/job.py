"""The plan of `anyflow prepare`: its clips and settings, and the shards that it writes in each of its rounds.

A job has at most two rounds: the generation that a killed job left unfinished, and then what has been added since.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

from anyflow_train.config.commands import PrepareConfig
from anyflow_train.config.derived import latent_shape
from anyflow_train.data.captions import read_prompts
from anyflow_train.data.fingerprint import NAMED, component_fingerprint, known
from anyflow_train.data.index import Skipped
from anyflow_train.data.manifest import MANIFEST, Bucket, CodecInfo, parse_manifest
from anyflow_train.data.prepare.captions import CaptionReader
from anyflow_train.data.prepare.growth import Changes, Wanted, find_changes, next_generation
from anyflow_train.data.prepare.ledger import Ledger, record_of
from anyflow_train.data.prepare.older import SETTINGS, adopt
from anyflow_train.data.prepare.sources import Clip, Gone, Source, list_clips, list_prompts
from anyflow_train.data.prepare.workers import Workers
from anyflow_train.errors import UserError
from anyflow_train.models.codec import Codec
from anyflow_train.text import public_name

# These keys may change while a folder grows.
MAY_CHANGE = {"source", "prompts", "negative_prompt", "validation_prompts"}
# These keys do not change the shards (`batch` changes only rounding). `codec` enters as hashes instead.
FREE_KEYS = MAY_CHANGE | {"out", "codec", "device", "threads", "batch", "prune", "latents", "dry_run"}
# These keys are newer than some folders. They are written only if they are set, so that such a folder can go on.
LATER_KEYS = {"buckets", "windows", "hdr", "caption_key", "encoding", "min_size", "min_seconds", "max_upscale"}
TEACHER_KEYS = {"teacher", "steps", "guidance_scale", "shift", "seed"}


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: clips, usable or not; or the shard whose samples of these clips are copied."""

    name: str
    clips: tuple[Clip, ...]
    origin: str | None = None

    @property
    def text_name(self) -> str:
        """Temporary file of the shard's text embeddings."""
        return "." + self.name.removesuffix(".tar") + ".text.safetensors"


@dataclass(frozen=True)
class PreparePlan:
    """The whole job.

    Attributes:
        config: config of the command.
        folder: folder of the shards.
        source: all clips.
        settings: settings that change the shards, as written to `prepare.json`.
    """

    config: PrepareConfig
    folder: Path
    source: Source
    settings: dict[str, object]

    @cached_property
    def wanted(self) -> Wanted:
        """Content that the folder shall have. Reads all captions."""
        validation = read_prompts(self.config.validation_prompts, "validation_prompts")
        return Wanted(
            records={clip.key: record_of(clip) for clip in self.source.clips},
            problems=self.source.problems,
            negative=self.config.negative_prompt,
            validation=validation,
            samples_per_shard=self.config.samples_per_shard,
            prune=self.config.prune,
        )

    def ledger(self) -> Ledger:
        """Read the ledger of the folder."""
        return Ledger.read(self.folder)

    def changes(self) -> Changes:
        """Compare the source with the complete shards of the folder. Nothing is written.

        Raises:
            UserError: an older version has left the folder unfinished, and the clips have changed.
        """
        if not (self.folder / SETTINGS).exists():
            return find_changes({}, self.wanted.records)
        ledger = self.ledger()
        if not ledger.generations and (first := adopt(self.folder, self.source, self.wanted)) is not None:
            ledger = Ledger(self.folder, (first,))
        return find_changes(ledger.complete().outcomes(), self.wanted.records)

    def skipped(self) -> list[Skipped]:
        """List all clips of the source that were skipped, or some windows of them; and those that were not listed."""
        outcomes = self.ledger().outcomes().items()
        lost = [one.lost for key, one in outcomes if key in self.wanted.records]
        return [*self.source.problems, *chain.from_iterable(lost)]


@dataclass(frozen=True)
class Round:
    """The unfinished shards of one generation.

    Attributes:
        number: number of the round in this job.
        shards: shards that are not complete.
        done: clips of the generation in complete shards.
        text: file of the embeddings of the prompts.
    """

    number: int
    shards: tuple[ShardPlan, ...]
    done: int
    text: str


def make_plan(config: PrepareConfig) -> PreparePlan:
    """List the clips. Raises UserError if there are none."""
    reader = CaptionReader(config.caption_key, config.encoding)
    prompts = config.prompts
    pictures = any(size.frames == 1 for size in config.sizes)
    source = list_prompts(prompts, reader) if prompts else list_clips(config.source or "", reader, pictures)
    unset = {key for key in LATER_KEYS if getattr(config, key) == PrepareConfig.model_fields[key].default}
    settings: dict[str, object] = config.model_dump(mode="json", exclude=FREE_KEYS | unset)
    if config.teacher is not None:
        settings["teacher"] = public_fingerprint(config.teacher, "transformer")
    else:
        settings = {key: value for key, value in settings.items() if key not in TEACHER_KEYS}
    settings["kind"] = "video" if prompts is None or config.teacher is not None else "prompts"
    settings["codec"] = {part: public_fingerprint(config.codec, part) for part in ("vae", "text_encoder")}
    return PreparePlan(config, Path(config.out).expanduser(), source, settings)


def rounds(plan: PreparePlan, workers: Workers) -> Iterator[Round]:
    """Yield the rounds of the job. Process 0 plans each one after the round before it has been finished.

    Raises:
        UserError: this process does not find a clip that process 0 has.
    """
    planned = _planned(plan) if workers.is_main else iter(())
    clips = {clip.key: clip for clip in plan.source.clips}
    for number in count():
        found = workers.share(f"round {number}", next(planned, {}))
        if not found:
            return workers.await_all("the end")
        gone = set(found["gone"])
        shards = tuple(
            ShardPlan(name, tuple(_find(clips, key, gone, workers.rank) for key in keys), origin)
            for name, keys, origin in found["shards"]
        )
        yield Round(number, shards, found["done"], found["text"])


def is_current(ledger: Ledger) -> bool:
    """Whether all planned shards are complete, and the manifest lists them."""
    path = ledger.folder / MANIFEST
    if ledger.unfinished() or not path.exists():
        return False
    manifest, states = parse_manifest(path.read_bytes(), str(path)), ledger.states()
    names = [shard.name for shard in manifest.shards]
    return names == [shard.name for shard in ledger.shards] and manifest.generations == len(states)


def public_fingerprint(source: str, part: str) -> str:
    """Return the fingerprint of a component of a codec, for files that are shared: without local folders."""
    found = component_fingerprint(source, part)
    return found if known(found) else NAMED + public_name(source)


def codec_info(config: PrepareConfig, codec: Codec) -> CodecInfo:
    """Describe the codec, for the manifest."""
    return CodecInfo(
        source=public_name(config.codec),
        vae=public_fingerprint(config.codec, "vae"),
        text_encoder=public_fingerprint(config.codec, "text_encoder"),
        latents_mean=codec.latents_mean,
        latents_std=codec.latents_std,
    )


def codec_buckets(config: PrepareConfig, codec: Codec) -> tuple[Bucket, ...]:
    """Return the sizes of the samples, with the shapes of their latents."""
    facts = len(codec.latents_mean), codec.temporal_factor, codec.spatial_factor
    return tuple(Bucket(**size._asdict(), latent_shape=latent_shape(size, *facts)) for size in config.sizes)


def _planned(plan: PreparePlan) -> Iterator[dict[str, Any]]:
    """Plan the rounds, as JSON for the other processes. Each generation is written before it is yielded."""
    folder, ledger = plan.folder, plan.ledger()
    if not ledger.generations and (found := adopt(folder, plan.source, plan.wanted)) is not None:
        found.write(folder)
        ledger = plan.ledger()
    interrupted = bool(ledger.generations) and not is_current(ledger)
    if interrupted:
        yield _share(plan, ledger)
        ledger = plan.ledger()
    ledger.delete_removed()  # a job may have been killed before this
    generation = next_generation(ledger, plan.wanted, retry=not interrupted)
    if generation is not None:
        generation.write(folder)
        yield _share(plan, plan.ledger())


def _share(plan: PreparePlan, ledger: Ledger) -> dict[str, Any]:
    unfinished, newest, records = ledger.unfinished(), ledger.generations[-1], plan.wanted.records
    keys = {clip.key for shard in unfinished for clip in shard.clips}
    clips = sum(len(shard.clips) for shard in newest.shards)
    return {
        "shards": [(shard.name, [clip.key for clip in shard.clips], shard.origin) for shard in unfinished],
        "gone": sorted(keys - records.keys()),
        "done": clips - sum(len(shard.clips) for shard in unfinished),
        "text": newest.prompts.text,
    }


def _find(clips: Mapping[str, Clip], key: str, gone: set[str], rank: int) -> Clip:
    if key in clips:
        return clips[key]
    if key not in gone:
        raise UserError("source", f"{key} is not there on process {rank}; give all nodes the same files")
    return Clip(key, None, Gone())
