"""Keys of `anyflow prepare`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PlainValidator, PositiveFloat, PositiveInt
from pydantic_core import PydanticCustomError

from anyflow_train.config.base import ClipSize, Model, Sizes


def _windows(value: object) -> str:
    if not re.fullmatch(r"first|all|[1-9]\d*|(?=.*[1-9])\d*\.?\d+s", str(value)):
        raise PydanticCustomError("windows", "give first, all, a number of windows (8), or seconds between them (2s)")
    return str(value)


class PrepareConfig(Model):
    """`anyflow prepare`: video and captions -> shards of latents and text embeddings.

    out: folder for the shards and their manifest.
    source: folder or WebDataset of clips (with a `.txt` or `.json` file per clip), or a list of clips (CSV, TSV, JSON,
        JSONL, Parquet, or TXT with one video per line); null for prompts only.
    prompts: text file with one prompt per line, or a list with captions, for shards of prompts only.
    teacher: pipeline folder, hub id or run whose network makes the latents for `prompts`; null writes prompts only.
    steps: Euler steps of the teacher.
    guidance_scale: CFG scale w of the teacher; 1 means no guidance.
    shift: timestep shift of the teacher's steps.
    seed: seed of the teacher's noise.
    latents: latents and texts of Wan2.1 that FastVideo (`.parquet`) or rcm (`.tar`) have cached: a file or folder. They
        become shards in one process, without growth.
    caption_key: name of the caption in JSON, or of its column; null tries caption, text, prompt and cap.
    encoding: encoding of captions and lists that are not Unicode, such as cp1252 or shift_jis; null reads them as
        cp1252 with a warning.
    codec: Wan2.1 pipeline folder or hub id (VAE, text encoder, tokenizer).
    frames: frames per clip, 4n + 1.
    height, width: size of the clips in pixels.
    buckets: sizes as frames, height and width, such as [17x64x64,17x48x80,1x64x64], in place of frames, height and
        width. A clip goes into the one that crops the least of it; the teacher's clips get one by chance.
    fps: frame rate to which clips are resampled.
    windows: parts of a clip that become samples: its beginning (first), whole parts one after the other (all), a number
        of evenly spread ones (8), or one every so many seconds (2s).
    hdr: clips in HDR (PQ or HLG) are tone mapped to SDR (tonemap), or skipped and counted (skip).
    min_size, min_seconds: clips with a shorter side (pixels), or a shorter duration by their file, are skipped.
    max_upscale: clips that would have to be enlarged by more than this factor are skipped; null enlarges any.
    max_text_length: largest number of tokens per text; longer texts are cut.
    negative_prompt: text for guidance and text dropout.
    validation_prompts: prompts, or one text file with prompts, whose embeddings are stored in the manifest.
    prune: remove samples of clips that are gone from the source, and old samples of clips that have changed. Runs that
        began on them cannot be resumed.
    dry_run: print what would be encoded, and write a contact sheet of 16 decoded clips next to `out`.
    batch: clips that the VAE encodes, or the teacher makes, at a time.
    precision: precision of the text encoder and of the teacher's matrix products; embeddings are stored in it.
    vae_precision: precision of the VAE; Wan's own code runs it in float32.
    latent_dtype: type of the stored latents; bf16 halves the disk space and rounds values by up to 0.4 %.
    """

    out: str
    source: str | None = None
    prompts: str | None = None
    teacher: str | None = None
    steps: PositiveInt = 50
    guidance_scale: PositiveFloat = 1.0
    shift: PositiveFloat = 5.0
    seed: NonNegativeInt = 0
    latents: str | None = None
    caption_key: str | None = None
    encoding: str | None = None
    codec: str
    frames: PositiveInt = 81
    height: PositiveInt = 480
    width: PositiveInt = 832
    buckets: Sizes = ()
    fps: PositiveFloat = 16.0
    windows: Annotated[str, PlainValidator(_windows)] = "first"
    hdr: Literal["tonemap", "skip"] = "tonemap"
    min_size: NonNegativeInt = 0
    min_seconds: NonNegativeFloat = 0.0
    max_upscale: PositiveFloat | None = None
    max_text_length: PositiveInt = 512
    negative_prompt: str = ""
    validation_prompts: tuple[str, ...] = ()
    samples_per_shard: PositiveInt = 256
    prune: bool = False
    dry_run: bool = False
    batch: PositiveInt = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    vae_precision: Literal["fp32", "bf16"] = "fp32"
    latent_dtype: Literal["fp32", "bf16"] = "fp32"
    threads: NonNegativeInt = 0

    @property
    def sizes(self) -> tuple[ClipSize, ...]:
        """All sizes of the samples."""
        return self.buckets or (ClipSize(self.frames, self.height, self.width),)
