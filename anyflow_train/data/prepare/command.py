"""`anyflow prepare`: clips and captions -> shards of latents and text embeddings.

There are two passes, so that the text encoder (11 GiB for Wan2.1) and the VAE are never in memory together. The first
pass writes the texts of each unfinished shard into a temporary file. The second pass encodes the videos, which are
decoded in the background. The contents of a shard depend on the list of clips alone, and a shard appears only when it
is complete. So a killed job continues after its last complete shard, and any number of processes can share a job
(`accelerate launch`). The folder is equal byte for byte if the device and the number of threads are the same.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from anyflow_train.config.commands import PrepareConfig
from anyflow_train.data.captions import read_prompts
from anyflow_train.data.index import Skipped, index_name
from anyflow_train.data.manifest import FORMAT, MANIFEST, TEXT, CodecInfo, Manifest, ShardInfo, write_manifest
from anyflow_train.data.prepare.job import PreparePlan, ShardPlan, make_plan, public_fingerprint, read_all_skipped
from anyflow_train.data.prepare.output_lock import forget_settings, lock_output, wait_until_all_are_there
from anyflow_train.data.prepare.progress import ClipProgress
from anyflow_train.data.prepare.sources import format_counts
from anyflow_train.data.prepare.texts import encode_prompts, encode_shard_texts
from anyflow_train.data.prepare.video import read_clip
from anyflow_train.data.prepare.videos import write_prompt_shards, write_video_shards
from anyflow_train.data.prepare.workers import Workers, join_workers
from anyflow_train.devices import DTYPES, pick_device
from anyflow_train.errors import UserError
from anyflow_train.files import atomic_file, check_writable, file_sha256
from anyflow_train.models.codec import Codec
from anyflow_train.text import public_name

SKIPPED = "skipped.jsonl"


def run(config: PrepareConfig) -> None:
    """Write the missing shards, and then the manifest.

    Raises:
        UserError: there are no clips, the folder was started with other settings, or no clip could be used.
        KeyboardInterrupt: after a message on how to continue.
        SystemExit: on other processes than 0; process 0 reports the reason.
    """
    check_writable(Path(config.out))
    with join_workers() as workers:
        plan = make_plan(config)
        with lock_output(plan, workers) as remaining:
            device = pick_device(config.device, config.threads, local_rank=workers.local_rank)
            try:
                _prepare(PrepareJob(config, plan, workers, remaining, device))
            except UserError:
                if workers.is_main:
                    forget_settings(plan)
                raise


@dataclass(frozen=True)
class PrepareJob:
    """The remaining work of all processes, and the device of this one."""

    config: PrepareConfig
    plan: PreparePlan
    workers: Workers
    remaining: list[ShardPlan]
    device: torch.device

    @property
    def shards(self) -> list[ShardPlan]:
        """Shards that this process writes."""
        return self.remaining[self.workers.rank :: self.workers.size]

    def codec(self, precision: str) -> Codec:
        """Load the codec. Each call loads it again, so that VAE and text encoder are not in memory together."""
        return Codec.load(self.config.codec, self.device, DTYPES[precision])


def _prepare(job: PrepareJob) -> None:
    plan, start = job.plan, time.monotonic()
    clips = _clips(job.remaining)
    complete = (plan.folder / MANIFEST).exists() and not clips
    try:
        if not complete:
            _encode_texts(job, clips)
        with ClipProgress("prompts" if job.config.prompts else "clips", clips, job.workers) as progress:
            _write_shards(job, progress)
            progress.finish()
    except KeyboardInterrupt:
        if job.workers.is_main:
            done = len(plan.shards) - len(plan.unfinished())
            shards = f"{done} of {len(plan.shards)} shards are written"
            print(f"stopped: {shards}; run the same command to continue", flush=True)
        raise
    if not job.workers.is_main:
        return
    if complete:
        print(f"{plan.folder} is complete: {_summary(plan, job.config.max_text_length)}")
        return
    wait_until_all_are_there(plan)
    _finish(job)
    rate = clips / (time.monotonic() - start)
    print(f"{plan.folder}: {_summary(plan, job.config.max_text_length)}; {rate:.1f} clips/s including start-up")


def _clips(shards: list[ShardPlan]) -> int:
    return sum(len(shard.clips) for shard in shards)


def _encode_texts(job: PrepareJob, clips: int) -> None:
    """Encode the prompts, and the texts of those shards of this process that do not have them from an earlier job."""
    config, folder = job.config, job.plan.folder
    prompts_missing = job.workers.is_main and not (folder / TEXT).exists()
    without_texts = [shard for shard in job.shards if not (folder / shard.text_name).exists()]
    if not without_texts and not prompts_missing:
        return
    codec = job.codec(config.precision)
    if prompts_missing:
        prompts = read_prompts(config.validation_prompts, "validation_prompts")
        encode_prompts(codec, folder, config.negative_prompt, prompts, config.max_text_length)
    with ClipProgress("texts", clips, job.workers) as progress:
        progress.advance(_clips(job.shards) - _clips(without_texts))
        encode_shard_texts(codec, folder, without_texts, config.max_text_length, progress)


def _write_shards(job: PrepareJob, progress: ClipProgress) -> None:
    config, folder = job.config, job.plan.folder
    if config.prompts is not None:
        write_prompt_shards(folder, job.shards, progress)
    elif job.shards:
        shape = config.model_dump(include={"frames", "height", "width", "fps", "hdr"})
        read = partial(read_clip, **shape)
        encode = job.codec(config.vae_precision).encode_video
        write_video_shards(read, encode, folder, job.shards, config.batch, DTYPES[config.latent_dtype], progress)


def _finish(job: PrepareJob) -> None:
    """Write the list of skipped clips, and the manifest, which makes the folder usable."""
    plan = job.plan
    for shard in plan.shards:
        (plan.folder / shard.text_name).unlink(missing_ok=True)  # a job may have been killed before this
    skipped = read_all_skipped(plan)
    with atomic_file(plan.folder / SKIPPED) as file:
        for entry in skipped:
            file.write(json.dumps(asdict(entry), ensure_ascii=False).encode() + b"\n")
    manifest = _manifest(job.config, plan)
    if manifest.samples == 0:
        raise UserError("source", f"no clip could be used: {_reasons(skipped)}; {plan.folder / SKIPPED} lists them")
    if job.config.prompts is None:
        manifest = _with_video(manifest, job.config, job.codec(job.config.vae_precision))
    write_manifest(plan.folder, manifest)


def _manifest(config: PrepareConfig, plan: PreparePlan) -> Manifest:
    """Make the manifest of shards without video."""
    indices = [plan.index(shard) for shard in plan.shards]
    shards = tuple(
        ShardInfo(
            name=shard.name,
            samples=len(index.entries),
            bytes=(plan.folder / shard.name).stat().st_size,
            index_sha256=file_sha256(plan.folder / index_name(shard.name)),
        )
        for shard, index in zip(plan.shards, indices, strict=True)
    )
    with safe_open(plan.folder / TEXT, "pt") as texts:
        text_dim = texts.get_slice("negative").get_shape()[1]
    return Manifest(
        format=FORMAT,
        kind="prompts",
        shards=shards,
        text_dim=text_dim,
        max_text_length=config.max_text_length,
        longest_text=max(index.longest_text or 0 for index in indices),
        codec=CodecInfo(
            source=public_name(config.codec), text_encoder=public_fingerprint(config.codec, "text_encoder")
        ),
        negative_prompt=config.negative_prompt,
        validation_prompts=read_prompts(config.validation_prompts, "validation_prompts"),
        clips=len(plan.source.clips) + len(plan.source.problems),
        skipped=sum(len(index.skipped) for index in indices) + len(plan.source.problems),
    )


def _with_video(manifest: Manifest, config: PrepareConfig, codec: Codec) -> Manifest:
    """Add the facts about videos to the manifest of their texts."""
    frames = (config.frames - 1) // codec.temporal_factor + 1
    height, width = config.height // codec.spatial_factor, config.width // codec.spatial_factor
    vae = {"vae": public_fingerprint(config.codec, "vae")}
    normalisation = {"latents_mean": codec.latents_mean, "latents_std": codec.latents_std}
    facts = config.model_dump(include={"latent_dtype", "frames", "height", "width", "fps"}) | {
        "kind": "video",
        "latent_shape": (frames, len(codec.latents_mean), height, width),
        "codec": manifest.codec.model_copy(update=vae | normalisation),
    }
    return manifest.model_copy(update=facts)


def _summary(plan: PreparePlan, max_text_length: int) -> str:
    skipped, indices = read_all_skipped(plan), [plan.index(shard) for shard in plan.shards]
    samples = sum(len(index.entries) for index in indices)
    text = f"{samples} samples in {len(plan.shards)} shards from {samples + len(skipped)} clips"
    if skipped:
        text += f"; {len(skipped)} skipped ({_reasons(skipped)}), listed in {plan.folder / SKIPPED}"
    if unused := sum(plan.source.unused.values()):
        text += f"; {unused} not used ({format_counts(plan.source.unused)})"
    if skipped or unused:
        found = samples + len(skipped) + unused
        text += f"; found {found} = {samples} encoded + {len(skipped)} skipped + {unused} not used"
    if cut := [key for index in indices for key in index.cut]:
        text += f"; {len(cut)} with a caption of more than {max_text_length} tokens, cut there (for example {cut[0]})"
    return text


def _reasons(skipped: list[Skipped]) -> str:
    """Count the skipped clips by reason, without the details after the colon."""
    counts = Counter(entry.reason.partition(":")[0] for entry in skipped)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
