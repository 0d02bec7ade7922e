"""`anyflow prepare`: clips and captions -> shards of latents and text embeddings.

There are two passes, so that the text encoder (11 GiB for Wan2.1) and the VAE are never in memory together. The first
pass writes the texts of each unfinished shard into a temporary file. The second pass encodes the videos, which are
decoded in the background. The contents of a shard depend on the list of clips alone, and a shard appears only when it
is complete. So a killed job continues after its last complete shard, and any number of processes can share a job
(`accelerate launch`). The folder is equal byte for byte if the device and the number of threads are the same. A source
that has grown adds shards to the folder (see `ledger` and `growth`); the shards that it has stay as they are.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from anyflow_train.config.commands import PrepareConfig
from anyflow_train.data.index import Skipped, index_name
from anyflow_train.data.manifest import (
    DIGITS,
    FORMAT,
    MANIFEST,
    CodecInfo,
    Manifest,
    parse_manifest,
    write_manifest,
)
from anyflow_train.data.prepare import own
from anyflow_train.data.prepare.job import (
    PreparePlan,
    Round,
    ShardPlan,
    codec_buckets,
    codec_info,
    make_plan,
    public_fingerprint,
    rounds,
)
from anyflow_train.data.prepare.older import SKIPPED
from anyflow_train.data.prepare.output_lock import lock_output, wait_until_all_are_there
from anyflow_train.data.prepare.progress import ClipProgress
from anyflow_train.data.prepare.sources import format_counts
from anyflow_train.data.prepare.texts import encode_prompts, encode_shard_texts
from anyflow_train.data.prepare.video import read_windows
from anyflow_train.data.prepare.videos import Maker, from_network, from_texts, from_videos, write_shards
from anyflow_train.data.prepare.windows import Framing, clip_of
from anyflow_train.data.prepare.workers import Workers, join_workers
from anyflow_train.data.prepare.writing import copy_shard, describe_shard
from anyflow_train.devices import DTYPES, pick_device
from anyflow_train.errors import UserError
from anyflow_train.files import atomic_file, check_writable
from anyflow_train.models.codec import Codec
from anyflow_train.text import public_name, some

LoadTeacher = Callable[[PrepareConfig, torch.device, Tensor], Maker]
"""Config, device and embedding (L, D) of the negative prompt -> functions that make latents."""


def run(config: PrepareConfig, load_teacher: LoadTeacher | None = None) -> None:
    """Write the missing shards, and then the manifest. Or convert latents that others have cached.

    Args:
        config: config of the command.
        load_teacher: loads the network for `config.teacher`; only needed if that is set.

    Raises:
        UserError: there are no clips, the folder was started with other settings, or no clip could be used.
        KeyboardInterrupt: after a message on how to continue.
        SystemExit: on other processes than 0; process 0 reports the reason.
    """
    check_writable(Path(config.out).expanduser())
    if config.latents is not None:
        return own.convert(config)
    with join_workers() as workers:
        plan, device = make_plan(config), None
        with lock_output(plan, workers):
            for part in rounds(plan, workers):
                device = device or pick_device(config.device, config.threads, local_rank=workers.local_rank)
                _prepare(PrepareJob(config, plan, workers, part, device, load_teacher))
            if workers.is_main and device is None:
                print(f"{plan.folder} is complete: {_summary(plan)}")


@dataclass(frozen=True)
class PrepareJob:
    """The work of all processes in one round, and the device of this one."""

    config: PrepareConfig
    plan: PreparePlan
    workers: Workers
    round: Round
    device: torch.device
    load_teacher: LoadTeacher | None

    @property
    def shards(self) -> list[ShardPlan]:
        """Shards that this process encodes."""
        return [shard for shard in self.round.shards if shard.origin is None][self.workers.rank :: self.workers.size]

    @property
    def copies(self) -> list[ShardPlan]:
        """Shards that this process copies from others."""
        return [shard for shard in self.round.shards if shard.origin is not None and self.workers.is_main]

    def progress(self, task: str) -> ClipProgress:
        """Count the clips of all processes in a task."""
        done, left = self.round.done, _clips(self.round.shards)
        return ClipProgress(task, done + left, self.workers, done, self.round.number)

    def codec(self, precision: str) -> Codec:
        """Load the codec. Each call loads it again, so that VAE and text encoder are not in memory together."""
        return Codec.load(self.config.codec, self.device, DTYPES[precision])


def _prepare(job: PrepareJob) -> None:
    plan, start = job.plan, time.monotonic()
    try:
        _encode_texts(job)
        with job.progress("prompts" if job.config.prompts else "clips") as progress:
            _write_shards(job, progress)
            progress.finish()
    except KeyboardInterrupt:
        if job.workers.is_main:
            ledger = plan.ledger()
            done = len(ledger.shards) - len(ledger.unfinished())
            shards = f"{done} of {len(ledger.shards)} shards are written"
            print(f"stopped: {shards}; run the same command to continue", flush=True)
        raise
    if not job.workers.is_main:
        return
    wait_until_all_are_there(plan)
    if not _finish(job):
        print(f"{plan.folder} is complete: {_summary(plan)}")
        return
    clips = _clips([shard for shard in job.round.shards if shard.origin is None])
    rate = f"; {clips / (time.monotonic() - start):.1f} clips/s including start-up" if clips else ""
    print(f"{plan.folder}: {_summary(plan)}{rate}")


def _clips(shards: Sequence[ShardPlan]) -> int:
    return sum(len(shard.clips) for shard in shards)


def _encode_texts(job: PrepareJob) -> None:
    """Encode the prompts, and the texts of those shards of this process that do not have them from an earlier job."""
    config, folder = job.config, job.plan.folder
    prompts_missing = job.workers.is_main and not (folder / job.round.text).exists()
    without_texts = [shard for shard in job.shards if not (folder / shard.text_name).exists()]
    if not without_texts and not prompts_missing:
        return
    codec = job.codec(config.precision)
    if prompts_missing:
        prompts = job.plan.ledger().generations[-1].prompts
        encode_prompts(codec, folder / job.round.text, prompts.negative, prompts.validation, config.max_text_length)
    with job.progress("texts") as progress:
        progress.advance(_clips([*job.shards, *job.copies]) - _clips(without_texts))
        encode_shard_texts(codec, folder, without_texts, config.max_text_length, progress)


def _write_shards(job: PrepareJob, progress: ClipProgress) -> None:
    config, folder, dtype = job.config, job.plan.folder, DTYPES[job.config.latent_dtype]
    for shard in job.copies:
        copy_shard(folder, shard.name, shard.origin or "", frozenset(clip.key for clip in shard.clips))
        progress.advance(len(shard.clips))
    if not job.shards:
        return
    shapes: list[tuple[int, ...]] = []
    if config.teacher is not None:
        assert job.load_teacher is not None
        with safe_open(folder / job.round.text, "pt") as texts:
            maker = job.load_teacher(config, job.device, texts.get_tensor("negative"))
        shapes = _shapes(config, job.codec(config.vae_precision)) if config.buckets else []
        outcomes = from_network(maker, folder, job.shards, config.batch, dtype)
    elif config.prompts is not None:
        outcomes = from_texts(folder, job.shards)
    else:
        read, codec = partial(read_windows, framing=Framing.of(config)), job.codec(config.vae_precision)
        shapes = _shapes(config, codec)
        outcomes = from_videos(read, codec.encode_video, folder, job.shards, config.batch, dtype)
    write_shards(folder, job.shards, outcomes, progress, shapes)


def _shapes(config: PrepareConfig, codec: Codec) -> list[tuple[int, ...]]:
    """List the shapes of latents (F, C, H, W) of the buckets, if there are several."""
    return [one.latent_shape for one in codec_buckets(config, codec)] if len(config.sizes) > 1 else []


def _finish(job: PrepareJob) -> bool:
    """Write the list of skipped clips, and the manifest, which makes the new shards usable.

    Returns:
        False if clips that were skipped before have been tried again, and none can be used.
    """
    plan, ledger = job.plan, job.plan.ledger()
    newest = ledger.generations[-1]
    for shard in newest.shards:
        _remove(plan.folder, ShardPlan(shard.name, ()).text_name)  # a job may have been killed before this
    if newest.only_retries and not any(ledger.index(shard.name).entries for shard in newest.shards):
        # No clip can be used now. The folder stays as it was, so that retries do not make it grow. The generation's
        # file goes last: a job that is killed before does the same again.
        _remove(plan.folder, *(name for shard in newest.shards for name in (index_name(shard.name), shard.name)))
        _remove(plan.folder, newest.name)
        return False
    skipped = plan.skipped()
    with atomic_file(plan.folder / SKIPPED) as file:
        for entry in skipped:
            file.write(json.dumps(asdict(entry), ensure_ascii=False).encode() + b"\n")
    states = ledger.states()
    infos = [describe_shard(ledger.folder, shard.name, ledger.index(shard.name)) for shard in ledger.shards]
    manifest = _facts(job).grown(states, infos)
    if manifest.samples == 0:
        raise UserError("source", f"no clip could be used: {_reasons(skipped)}; {plan.folder / SKIPPED} lists them")
    write_manifest(plan.folder, manifest)
    ledger.delete_removed()
    return True


def _remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _facts(job: PrepareJob) -> Manifest:
    """Return the manifest without shards: that of the folder, or a new one."""
    config, path = job.config, job.plan.folder / MANIFEST
    if path.exists():
        return parse_manifest(path.read_bytes(), str(path))
    with safe_open(job.plan.folder / job.round.text, "pt") as file:
        text_dim = file.get_slice("negative").get_shape()[1]
    manifest = partial(Manifest, format=FORMAT, shards=(), text_dim=text_dim, max_text_length=config.max_text_length)
    if config.prompts is not None and config.teacher is None:
        encoder = public_fingerprint(config.codec, "text_encoder")
        return manifest(kind="prompts", codec=CodecInfo(source=public_name(config.codec), text_encoder=encoder))
    codec = job.codec(config.vae_precision)
    buckets = codec_buckets(config, codec)
    return manifest(
        kind="video",
        codec=codec_info(config, codec),
        **dict(buckets[0]),
        latent_dtype=config.latent_dtype,
        fps=config.fps,
        buckets=buckets if len(buckets) > 1 else (),
    )


def _summary(plan: PreparePlan) -> str:
    """Describe the folder, and compare it with the source."""
    ledger = plan.ledger()
    outcomes = ledger.outcomes()
    encoded = {key for key, one in outcomes.items() if one.places}
    lost = plan.skipped()
    skipped = [one for one in lost if clip_of(one.key) not in encoded]
    here, samples = len(encoded & plan.wanted.records.keys()), sum(len(one.places) for one in outcomes.values())
    text = f"{samples} samples in {len(ledger.shards)} shards from {len(encoded) + len(skipped)} clips"
    if len(plan.config.sizes) > 1:
        digits = Counter("".join(ledger.index(shard.name).buckets for shard in ledger.shards))
        counts = (f"{digits[DIGITS[number]]} {size}" for number, size in enumerate(plan.config.sizes))
        text += f" ({', '.join(counts)})"
    if skipped:
        text += f"; {len(skipped)} skipped ({_reasons(skipped)}), listed in {plan.folder / SKIPPED}"
    if unused := sum(plan.source.unused.values()):
        text += f"; {unused} not used ({format_counts(plan.source.unused)})"
    if skipped or unused:
        found = here + len(skipped) + unused
        text += f"; found {found} = {here} encoded + {len(skipped)} skipped + {unused} not used"
    if rest := [one for one in lost if clip_of(one.key) in encoded]:
        text += f"; {len(rest)} clips lost windows ({_reasons(rest)}; for example {rest[0].key})"
    if gone := sorted(encoded - plan.wanted.records.keys()):
        text += f"; {len(gone)} gone from the source ({', '.join(some(gone))}), whose samples stay until prune=true"
    if cut := list({clip_of(key): None for shard in ledger.shards for key in ledger.index(shard.name).cut}):
        length = plan.config.max_text_length
        text += f"; {len(cut)} with a caption of more than {length} tokens, cut there (for example {cut[0]})"
    return text


def _reasons(skipped: list[Skipped]) -> str:
    """Count the skipped clips by reason, without the details after the colon."""
    counts = Counter(entry.reason.partition(":")[0] for entry in skipped)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
