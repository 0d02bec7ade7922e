"""Writes folders of small shards, of samples that a test makes up."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from anyflow_train.data.index import index_name
from anyflow_train.data.manifest import (
    FORMAT,
    MANIFEST,
    TEXT,
    CodecInfo,
    Manifest,
    PromptTexts,
    ShardInfo,
    parse_manifest,
    write_manifest,
    write_prompt_texts,
)
from anyflow_train.data.prepare.writing import write_shard
from anyflow_train.data.shards import Sample
from anyflow_train.files import file_sha256


def describe(shape: tuple[int, int, int, int], text_dim: int, longest_text: int) -> Manifest:
    """The manifest of clips of 32 x 32 pixels, as yet without shards; latents (F, C, H, W) in float32."""
    return Manifest(
        format=FORMAT,
        kind="video",
        shards=(),
        text_dim=text_dim,
        latent_shape=shape,
        latent_dtype="fp32",
        frames=4 * (shape[0] - 1) + 1,
        height=32,
        width=32,
        fps=16.0,
        longest_text=longest_text,
        codec=CodecInfo(source="somewhere", vae="abc", text_encoder="def"),
    )


def write_shards(folder: Path, parts: Iterable[Iterable[Sample]], manifest: Manifest, texts: PromptTexts) -> Path:
    """One shard for each part, their texts, and the manifest with the shards filled in."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, samples in enumerate(parts):
        name = f"shard-{number:06d}.tar"
        count = len(write_shard(folder, name, samples).entries)
        shards.append(ShardInfo(name=name, samples=count, bytes=(folder / name).stat().st_size))
    write_prompt_texts(folder / TEXT, texts)
    write_manifest(folder, manifest.model_copy(update={"shards": tuple(shards)}))
    return folder


def add_index_checksums(folder: Path) -> Path:
    """Add the checksums of the index files to a manifest, as `anyflow prepare` writes them."""
    manifest = parse_manifest((folder / MANIFEST).read_bytes(), "")
    checksums = [file_sha256(folder / index_name(shard.name)) for shard in manifest.shards]
    shards = [
        shard.model_copy(update={"index_sha256": checksum})
        for shard, checksum in zip(manifest.shards, checksums, strict=True)
    ]
    write_manifest(folder, manifest.model_copy(update={"shards": tuple(shards)}))
    return folder
