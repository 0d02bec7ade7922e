"""`anyflow prepare`: clips and captions -> shards of latents and text embeddings.

Two passes, so that the text encoder (11 GiB for Wan2.1) and the VAE are never in memory together: first the texts of
every unfinished shard, each into a file of its own, then the videos, decoded in the background while the VAE encodes.
A shard appears whole, and what is in it depends on the list of clips alone: a job that was killed continues where the
last whole shard ended, and shards could be dealt to any number of processes.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict

import torch
from safetensors import safe_open

from anyflow_train.config.commands import PrepareConfig
from anyflow_train.data.fingerprint import component_fingerprint
from anyflow_train.data.index import Skipped
from anyflow_train.data.manifest import FORMAT, MANIFEST, TEXT, CodecInfo, Manifest, ShardInfo, write_manifest
from anyflow_train.data.plan import Plan, claimed, make_plan, read_all_skipped
from anyflow_train.data.prepare_texts import (
    encode_prompts,
    encode_shard_texts,
    texts_to_encode,
)
from anyflow_train.data.prepare_videos import VideoShape, write_prompt_shards, write_video_shards
from anyflow_train.data.sources import validation_prompts
from anyflow_train.errors import UserError
from anyflow_train.files import atomic_file
from anyflow_train.models.codec import Codec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SKIPPED = "skipped.jsonl"


def run(config: PrepareConfig) -> None:
    """Write what is missing of the shards, and the manifest when all are there.

    Raises:
        UserError: there is no clip, the folder was begun with other settings, or no clip at all was usable.
        KeyboardInterrupt: after saying how to continue.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    plan = make_plan(config)
    with claimed(plan):
        if (plan.folder / MANIFEST).exists() and not plan.unfinished():
            print(f"{plan.folder} is complete: {_summary(plan)}")
            return
        start, clips = time.monotonic(), sum(len(shard.clips) for shard in plan.unfinished())
        try:
            _encode_texts(config, plan)
            _write_shards(config, plan)
        except KeyboardInterrupt:
            done = len(plan.shards) - len(plan.unfinished())
            print(f"stopped: {done} of {len(plan.shards)} shards are written; the same command continues", flush=True)
            raise
        print(f"{plan.folder}: {_summary(plan)}; {clips / (time.monotonic() - start):.1f} clips/s with all start-up")


def _encode_texts(config: PrepareConfig, plan: Plan) -> None:
    shards = texts_to_encode(plan)
    prompts_missing = not (plan.folder / TEXT).exists()
    if not shards and not prompts_missing:
        return
    codec = Codec.load(config.codec, _device(config), DTYPES[config.precision])
    if prompts_missing:
        prompts = validation_prompts(config.validation_prompts)
        encode_prompts(codec, plan, config.negative_prompt, prompts, config.max_text_length)
    encode_shard_texts(codec, plan, shards, config.max_text_length)


def _write_shards(config: PrepareConfig, plan: Plan) -> None:
    if config.prompts is not None:
        write_prompt_shards(plan)
        _finish(plan, _manifest(config, plan))
        return
    # Loaded anew, so that nothing of the text encoder is left in memory.
    codec = Codec.load(config.codec, _device(config), DTYPES[config.vae_precision])
    shape = VideoShape(config.frames, config.height, config.width, config.fps)
    write_video_shards(codec.encode_video, plan, shape, config.batch, DTYPES[config.latent_dtype])
    _finish(plan, _with_video(_manifest(config, plan), config, codec))


def _finish(plan: Plan, manifest: Manifest) -> None:
    """Name what was skipped, and write the manifest, which makes the folder usable."""
    skipped = read_all_skipped(plan)
    with atomic_file(plan.folder / SKIPPED) as file:
        for entry in skipped:
            file.write(json.dumps(asdict(entry), ensure_ascii=False).encode() + b"\n")
    if manifest.samples == 0:
        raise UserError("source", f"no clip could be used: {_reasons(skipped)}; {plan.folder / SKIPPED} names them")
    write_manifest(plan.folder, manifest)


def _manifest(config: PrepareConfig, plan: Plan) -> Manifest:
    """The manifest of shards without video."""
    indices = [plan.index(shard) for shard in plan.shards]
    shards = tuple(
        ShardInfo(name=shard.name, samples=len(index.entries), bytes=(plan.folder / shard.name).stat().st_size)
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
        codec=CodecInfo(source=config.codec, text_encoder=component_fingerprint(config.codec, "text_encoder")),
        negative_prompt=config.negative_prompt,
        validation_prompts=validation_prompts(config.validation_prompts),
        clips=len(plan.source.clips),
        skipped=sum(len(index.skipped) for index in indices) + len(plan.source.problems),
    )


def _with_video(manifest: Manifest, config: PrepareConfig, codec: Codec) -> Manifest:
    """The manifest of shards with video, from that of their texts."""
    frames = (config.frames - 1) // codec.temporal_factor + 1
    height, width = config.height // codec.spatial_factor, config.width // codec.spatial_factor
    normalisation = {
        "vae": component_fingerprint(config.codec, "vae"),
        "latents_mean": codec.latents_mean,
        "latents_std": codec.latents_std,
    }
    facts = {
        "kind": "video",
        "latent_shape": (frames, len(codec.latents_mean), height, width),
        "latent_dtype": config.latent_dtype,
        "frames": config.frames,
        "height": config.height,
        "width": config.width,
        "fps": config.fps,
        "codec": manifest.codec.model_copy(update=normalisation),
    }
    return manifest.model_copy(update=facts)


def _summary(plan: Plan) -> str:
    skipped = read_all_skipped(plan)
    samples = sum(len(plan.index(shard).entries) for shard in plan.shards)
    text = f"{samples} samples in {len(plan.shards)} shards from {len(plan.source.clips)} clips"
    if skipped:
        text += f"; {len(skipped)} skipped ({_reasons(skipped)}), named in {plan.folder / SKIPPED}"
    return text


def _reasons(skipped: list[Skipped]) -> str:
    """How many were skipped for which reason, without the details of each."""
    counts = Counter(entry.reason.partition(":")[0] for entry in skipped)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def _device(config: PrepareConfig) -> torch.device:
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
