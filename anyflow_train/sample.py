"""`anyflow sample`: videos from a run, a checkpoint, an exported folder or a hub id."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from anyflow_train.config.chunks import Chunks
from anyflow_train.config.commands import SampleConfig
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.evaluation.device import autocast_dtype, pick_device
from anyflow_train.evaluation.given import Source, given_latents
from anyflow_train.evaluation.grid import Grid, write_grid
from anyflow_train.evaluation.load import Model, load_model, on_device
from anyflow_train.evaluation.sampling import padded_condition
from anyflow_train.evaluation.video import Frames, to_frames, write_mp4
from anyflow_train.files import write_json
from anyflow_train.flow.causal import Sampler
from anyflow_train.flow.sampler import guided
from anyflow_train.flow.types import FlowMap
from anyflow_train.models.codec import Codec

GRID_ROWS = 8
SLUG_LENGTH = 40
# What `index.json` says of how the videos were made.
SETTINGS = (
    "shift",
    "guidance_scale",
    "negative_prompt",
    "text_length",
    "image",
    "video",
    "context_frames",
    "chunk_partition",
)


@dataclass(frozen=True)
class Size:
    """Of the videos: frames (4n + 1), height and width in pixels."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Entry:
    """One line of `index.json`."""

    file: str
    prompt: str
    steps: int
    seed: int


def run(config: SampleConfig) -> list[Entry]:
    """Write one mp4 for every (prompt, seed, number of calls), `grid.mp4`, `grid.gif` and `index.json`.

    Raises:
        UserError: there is no prompt, the model or its codec cannot be loaded, or the size does not fit it.
    """
    prompts = read_prompts(config)
    model = load_model(config.model, config.weights)
    size = video_size(config, model)
    device, dtype = pick_device(config.device, config.threads), autocast_dtype(config.precision)
    source = model.codec_source or config.model
    codec = Codec.load(source, device, torch.float32)
    chunks = _chunks(config, model, codec, size)
    _check_size(size, codec, model, chunks)
    start = _source(config, model)
    frames = _latent_frames(size, codec)
    given = None if start is None else given_latents(start, codec, frames, size.height, size.width, chunks)
    texts = _encode(source, [*prompts, config.negative_prompt], config.text_length, device, dtype or torch.float32)
    negative = padded_condition(texts[-1:], config.text_length, device)
    flow_map = guided(on_device(model.network, device, dtype), negative, config.guidance_scale)
    sampler = partial(replace(model.sampler, chunks=chunks), given=given)

    out = Path(config.out).expanduser()
    entries: list[Entry] = []
    rows: dict[str, list[Frames]] = {}
    for number, prompt in enumerate(prompts):
        for seed in config.seeds:
            noise = initial_noise(seed, model, codec, size)
            row = _one_row(config, sampler, flow_map, codec, texts[number], noise)
            for steps, frames in zip(config.steps, row, strict=True):
                entries.append(Entry(_file_name(number, prompt, seed, steps), prompt, steps, seed))
                write_mp4(out / entries[-1].file, frames, config.fps)
            if len(rows) < GRID_ROWS:
                rows[prompt if len(config.seeds) == 1 else f"{prompt}, seed {seed}"] = row
    columns = [f"{steps} call{'s' * (steps > 1)}" for steps in config.steps]
    write_grid(Grid(list(rows), columns, list(rows.values()), config.fps), out / "grid.mp4", out / "grid.gif")
    _write_index(config, model, size, entries, out)
    print(f"wrote {len(entries)} videos, grid.mp4, grid.gif and index.json to {out}")
    return entries


def read_prompts(config: SampleConfig) -> list[str]:
    """The prompts of the arguments, then those of the file, one a line; empty lines are left out, repeated ones too.

    Raises:
        UserError: the file cannot be read, or there is no prompt.
    """
    prompts = list(config.prompts)
    if config.prompt_file is not None:
        try:
            prompts += Path(config.prompt_file).expanduser().read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("prompt_file", f"'{config.prompt_file}' cannot be read: {error}") from None
    prompts = list(dict.fromkeys(prompt.strip() for prompt in prompts if prompt.strip()))
    if not prompts:
        raise UserError("prompts", "there is none; give prompts=['a prompt'] or prompt_file=FILE with one a line")
    return prompts


def video_size(config: SampleConfig, model: Model) -> Size:
    """The configured size; what is not configured is that of the training data.

    Raises:
        UserErrors: it is not configured, and the model does not say what it was trained on.
    """
    known = _trained_size(model)
    wanted = {"frames": config.frames, "height": config.height, "width": config.width}
    sides = known | {name: value for name, value in wanted.items() if value is not None}
    missing = [name for name in wanted if name not in sides]
    if missing:
        raise UserErrors([UserError(name, "is not set, and this model does not say it; set it") for name in missing])
    return Size(**sides)


def initial_noise(seed: int, model: Model, codec: Codec, size: Size) -> Tensor:
    """Noise (1, F, C, H, W) float32 of a seed: the same that diffusers' pipeline draws from a CPU generator."""
    frames = _latent_frames(size, codec)
    sides = (size.height // codec.spatial_factor, size.width // codec.spatial_factor)
    generator = torch.Generator().manual_seed(seed)
    channels = model.network.config["in_channels"]
    return torch.randn(1, channels, frames, *sides, generator=generator).transpose(1, 2).contiguous()


def _latent_frames(size: Size, codec: Codec) -> int:
    return (size.frames - 1) // codec.temporal_factor + 1


def _chunks(config: SampleConfig, model: Model, codec: Codec, size: Size) -> Chunks | None:
    """Of a causal model, for clips of this size.

    Raises:
        UserError: they do not make up the clip, or the model is not causal.
    """
    if model.chunks is None:
        if config.chunk_partition is not None:
            problem = f"{list(config.chunk_partition)}, but {model.name} generates all frames together; leave it out"
            raise UserError("chunk_partition", problem)
        return None
    chunks = replace(model.chunks, partition=config.chunk_partition or model.chunks.partition)
    frames = _latent_frames(size, codec)
    if sum(chunks.partition) != frames:
        problem = f"{list(chunks.partition)} sums to {sum(chunks.partition)}, but frames={size.frames} gives {frames}"
        raise UserError("chunk_partition", f"{problem} latent frames; give one that sums to {frames}")
    return chunks


def _source(config: SampleConfig, model: Model) -> Source | None:
    """The file that clips begin with.

    Raises:
        UserError: the model was trained without given frames.
    """
    key = "image" if config.image is not None else "video"
    path = getattr(config, key)
    if path is None:
        return None
    if not model.sees_given_frames:
        problem = f"'{path}', but {model.name} never saw given frames (it was trained with context.i2v_probability=0)"
        raise UserError(key, problem)
    if not Path(path).expanduser().is_file():
        raise UserError(key, f"'{path}' is no file")
    frames = 1 if key == "image" else config.context_frames
    return Source(key, Path(path), frames, config.fps)


def _one_row(
    config: SampleConfig, sampler: Sampler, flow_map: FlowMap, codec: Codec, text: Tensor, noise: Tensor
) -> list[Frames]:
    """Videos of one prompt and seed at all numbers of calls."""
    condition = padded_condition([text], config.text_length, codec.device)
    row = []
    for steps in config.steps:
        start = time.monotonic()
        with torch.inference_mode():
            latents = sampler(flow_map, noise.to(codec.device), condition, steps, config.shift)
            row.append(to_frames(codec.decode_video(latents)[0]))
        print(f"{steps} calls: {time.monotonic() - start:.1f} s", flush=True)
    return row


def _encode(source: str, texts: Sequence[str], length: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Embeddings (L_i, D) float32 on the CPU; the text encoder, often the largest network of all, is freed after."""
    return [text.float().cpu() for text in Codec.load(source, device, dtype).encode_text(texts, length)]


def _trained_size(model: Model) -> dict[str, int]:
    """What the run's config says, or the mark that `anyflow export` left in the folder."""
    if model.trained is not None:
        data = model.trained.data
        return {"frames": data.frames, "height": data.height, "width": data.width}
    data = model.marked.get("data", {})
    return {name: int(data[name]) for name in ("frames", "height", "width") if name in data}


def _check_size(size: Size, codec: Codec, model: Model, chunks: Chunks | None) -> None:
    errors = []
    if size.frames % codec.temporal_factor != 1:
        factor = codec.temporal_factor
        errors.append(UserError("frames", f"{size.frames} is not {factor}n + 1; {_nearest(size.frames, factor)} is"))
    compressed = chunks is not None and len(chunks.partition) > chunks.full_limit
    patch = model.network.config["compressed_patch_size" if compressed else "patch_size"]
    for name, side, tokens in (("height", size.height, patch[1]), ("width", size.width, patch[2])):
        if side % (codec.spatial_factor * tokens):
            errors.append(UserError(name, f"{side} is no multiple of {codec.spatial_factor * tokens}"))
    if errors:
        raise UserErrors(errors)


def _nearest(frames: int, factor: int) -> int:
    return max(0, round((frames - 1) / factor)) * factor + 1


def _file_name(number: int, prompt: str, seed: int, steps: int) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:SLUG_LENGTH].strip("-") or "prompt"
    return f"{number:03d}_{slug}_seed{seed}_calls{steps}.mp4"


def _write_index(config: SampleConfig, model: Model, size: Size, entries: list[Entry], out: Path) -> None:
    made = {"model": model.name, "step": model.step, "weights": config.weights, **asdict(size), "fps": config.fps}
    settings = {name: getattr(config, name) for name in SETTINGS}
    write_json(out / "index.json", {**made, **settings, "videos": [asdict(entry) for entry in entries]})
