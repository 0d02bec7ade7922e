"""Shards from latents that exist already: your own, or those that FastVideo and rcm have cached."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from anyflow_train.config.base import ClipSize
from anyflow_train.config.commands import PrepareConfig
from anyflow_train.data.captions import read_prompts
from anyflow_train.data.index import Skipped
from anyflow_train.data.manifest import (
    FORMAT,
    TEXT,
    Bucket,
    CodecInfo,
    Manifest,
    PromptTexts,
    ShardInfo,
    write_manifest,
    write_prompt_texts,
)
from anyflow_train.data.prepare.job import codec_buckets, codec_info
from anyflow_train.data.prepare.sources import path_key
from anyflow_train.data.prepare.tables import import_parquet
from anyflow_train.data.prepare.texts import encode_texts
from anyflow_train.data.prepare.writing import describe_shard, write_shard
from anyflow_train.data.shards import Sample
from anyflow_train.data.tar import Member, scan
from anyflow_train.devices import DTYPES, pick_device
from anyflow_train.errors import UserError, reason_of
from anyflow_train.files import regular
from anyflow_train.models.codec import Codec

FASTVIDEO = [f"{part}_{fact}" for part in ("vae_latent", "text_embedding") for fact in ("bytes", "shape", "dtype")]
RCM = {"latent": ("latent.pt", "latent.pth"), "embed": ("embed.pt", "embed.pth"), "prompt": ("prompt.txt",)}


def write_folder(
    folder: Path,
    samples: Iterable[Sample],
    codec: CodecInfo,
    texts: PromptTexts,
    negative_prompt: str = "",
    validation_prompts: tuple[str, ...] = (),
    fps: float = 16.0,
    factors: tuple[int, int] = (4, 8),
    samples_per_shard: int = 256,
    buckets: Sequence[Bucket] = (),
) -> Manifest:
    """Write a folder of shards.

    Args:
        folder: folder of the shards; it may exist, and must not contain shards.
        samples: samples with latents (F, C, H, W), normalised per channel, and texts (L, D) without padding. A sample
            of another shape than the first one, or than all buckets, is skipped.
        codec: the codec of the latents and texts.
        texts: embeddings of the negative prompt and of the validation prompts.
        negative_prompt: text that replaces a caption when training drops it.
        validation_prompts: prompts for the videos that validation shows.
        fps: frames per second of the clips.
        factors: frames per latent frame after the first, and pixels per latent, of the codec.
        samples_per_shard: most samples in a shard.
        buckets: sizes of the samples; needed if there are several.

    Returns:
        The manifest, which is written last.

    Raises:
        UserError: there are no samples, or the folder contains shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if next(folder.glob("*.tar"), None) is not None:
        raise UserError("out", f"{folder} contains shards; name a new folder")
    stream = iter(samples)
    first = next(stream, None)
    if first is None or first.latents is None:
        raise UserError(str(folder), "there is no sample with latents to write")
    if first.text.shape[1] != texts.negative.shape[1]:
        width = f"{first.text.shape[1]} numbers per token, but the negative prompt {texts.negative.shape[1]}"
        raise UserError(str(folder), f"the text of {first.key} has {width}; use the text encoder of the latents' model")
    frames, channels, height, width = first.latents.shape
    size = ClipSize((frames - 1) * factors[0] + 1, height * factors[1], width * factors[1])
    sizes = tuple(buckets) or (Bucket(**size._asdict(), latent_shape=(frames, channels, height, width)),)
    shapes = [one.latent_shape for one in sizes]
    shards, longest, skipped = list[ShardInfo](), 0, 0
    head: Sample | None = first
    while head is not None:
        name, part = f"shard-{len(shards):06d}.tar", chain([head], islice(stream, samples_per_shard - 1))
        index = write_shard(folder, name, (_of_shape(sample, shapes) for sample in part), shapes=shapes[1:] and shapes)
        head = next(stream, None)
        longest, skipped = max(longest, index.longest_text or 0), skipped + len(index.skipped)
        shards.append(describe_shard(folder, name, index))
    write_prompt_texts(folder / TEXT, texts)
    manifest = Manifest(
        format=FORMAT,
        kind="video",
        shards=tuple(shards),
        text_dim=first.text.shape[1],
        **dict(sizes[0]),
        latent_dtype="bf16" if first.latents.dtype == torch.bfloat16 else "fp32",
        buckets=sizes if len(sizes) > 1 else (),
        fps=fps,
        longest_text=longest,
        codec=codec,
        negative_prompt=negative_prompt,
        validation_prompts=validation_prompts,
        clips=sum(shard.samples for shard in shards) + skipped,
        skipped=skipped,
    )
    write_manifest(folder, manifest)
    return manifest


def convert(config: PrepareConfig) -> None:
    """Write shards from the latents of `config.latents`, with prompts that the codec encodes.

    Raises:
        UserError: the latents cannot be read, or `out` contains shards.
    """
    codec = Codec.load(config.codec, pick_device(config.device, config.threads), DTYPES[config.precision])
    validation = read_prompts(config.validation_prompts, "validation_prompts")
    negative, *others = encode_texts(codec, [config.negative_prompt, *validation], config.max_text_length)
    dtype = DTYPES[config.latent_dtype]
    manifest = write_folder(
        Path(config.out).expanduser(),
        read_cached(Path(config.latents or "").expanduser(), codec.latents_mean, codec.latents_std, dtype),
        codec_info(config, codec),
        PromptTexts(negative, tuple(others)),
        config.negative_prompt,
        validation,
        config.fps,
        (codec.temporal_factor, codec.spatial_factor),
        config.samples_per_shard,
        codec_buckets(config, codec) if config.buckets else (),
    )
    skipped = f"; {manifest.skipped} skipped, as they have another shape" if manifest.skipped else ""
    print(f"{config.out}: {manifest.samples} samples in {len(manifest.shards)} shards{skipped}")


def read_cached(path: Path, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Iterator[Sample]:
    """Read the latents and texts that FastVideo (`.parquet`) or rcm (`.tar`) have cached, from a file or a folder.

    Args:
        path: the file, or a folder of such files.
        mean, std: statistics of the latents; FastVideo stores latents that are not normalised, rcm normalised ones.
        dtype: dtype of the latents to return.

    Raises:
        UserError: there are no such files, or a file is damaged or has another format.
    """
    files = sorted(one for kind in ("*.parquet", "*.tar") for one in path.rglob(kind)) if path.is_dir() else [path]
    if not files or any(file.suffix not in (".parquet", ".tar") for file in files):
        raise UserError("latents", f"{path} is no .parquet or .tar file, and no folder of them")
    shift, scale = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    for file in files:
        parquet = file.suffix == ".parquet"
        try:
            for key, latents, text, caption in (_fastvideo if parquet else _rcm)(file):
                latents = latents.float().transpose(0, 1)  # (C, F, H, W) -> (F, C, H, W)
                latents = (latents - shift) / scale if parquet else latents
                yield Sample(path_key(f"{file.stem}/{key}"), latents.to(dtype).contiguous(), _valid(text), caption)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            advice = "give latents of Wan2.1 as FastVideo or rcm cache them"
            raise UserError("latents", f"{file} cannot be read: {reason_of(error)}; {advice}") from None


def _fastvideo(path: Path) -> Iterator[tuple[str, Tensor, Tensor, str]]:
    with import_parquet(path, "latents").ParquetFile(path) as file:
        for batch in file.iter_batches(8, columns=[*FASTVIDEO, "id", "caption"]):
            for row in batch.to_pylist():
                latents, text = (
                    _tensor(*(row[f"{part}_{fact}"] for fact in ("bytes", "shape", "dtype")))
                    for part in ("vae_latent", "text_embedding")
                )
                yield row["id"], latents, text, row["caption"] or ""


def _rcm(path: Path) -> Iterator[tuple[str, Tensor, Tensor, str]]:
    with open(regular(path), "rb") as file:
        found, damage = scan(file)
        if damage is not None:
            raise ValueError(damage)
        for key, members in found.items():
            latent, embed, prompt = (_member(members, names) for names in RCM.values())
            latents, text = (_load(_bytes(file.fileno(), one)) for one in (latent, embed))
            yield key, latents, text, _bytes(file.fileno(), prompt).decode("utf-8", "replace").strip()


def _member(members: Mapping[str, Member], names: tuple[str, ...]) -> Member:
    found = next((members[name] for name in names if name in members), None)
    if found is None:
        raise ValueError(f"a sample has no {names[0]}")
    return found


def _bytes(descriptor: int, member: Member) -> bytes:
    return os.pread(descriptor, member.size, member.offset)


def _load(data: bytes) -> Tensor:
    try:
        found = torch.load(io.BytesIO(data), "cpu", weights_only=True)
    except Exception as error:  # any file may stand here, and torch raises errors of the module that it reads with
        raise ValueError(f"a tensor cannot be loaded ({reason_of(error)})") from None
    if not isinstance(found, Tensor):
        raise ValueError(f"it contains a {type(found).__name__} instead of a tensor")
    return found.squeeze(0) if found.ndim in (3, 5) and len(found) == 1 else found


def _tensor(data: bytes, shape: list[int], dtype: str) -> Tensor:
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return torch.frombuffer(bytearray(data), dtype=kinds[dtype.removeprefix("torch.")]).view(shape)


def _valid(text: Tensor) -> Tensor:
    """Cut the zeros at the end of a text (L, D), with which others pad it."""
    used = text.any(dim=1).nonzero()
    return text[: int(used[-1]) + 1 if len(used) else 1].clone()


def _of_shape(sample: Sample, shapes: Sequence[tuple[int, ...]]) -> Sample | Skipped:
    found = None if sample.latents is None else tuple(sample.latents.shape)
    wanted = " or ".join(map(str, shapes))
    return sample if found in shapes else Skipped(sample.key, f"another shape: {found} instead of {wanted}")
