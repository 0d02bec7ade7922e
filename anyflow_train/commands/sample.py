"""`anyflow sample`: make videos with a run, a checkpoint, an exported folder or a hub id."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow_train.config.commands import SampleConfig
from anyflow_train.config.paths import find_codec
from anyflow_train.data import captions
from anyflow_train.devices import autocast_dtype, pick_device
from anyflow_train.errors import ConfigWarning, UserError
from anyflow_train.evaluation.clip_maker import ClipMaker, ClipRequest, clip_shape, encode_texts
from anyflow_train.evaluation.conditioning_frames import ConditioningSource, given_latents
from anyflow_train.evaluation.load import LoadedNetwork, load_model, on_device
from anyflow_train.evaluation.prompts import distinct, slug
from anyflow_train.evaluation.sampling import padded_condition
from anyflow_train.evaluation.video import Frames, Grid, write_grid, write_mp4
from anyflow_train.files import begin_results, check_results, write_json
from anyflow_train.flow.sampler import guided
from anyflow_train.models.codec import Codec
from anyflow_train.text import calls
from anyflow_train.training.checkpoints.inputs import known_fact, network_fact

GRID_ROWS = 8
# Words with which a part of a sentence goes on after a comma.
_CONTINUES = re.compile(r"(and|at|by|for|from|in|of|on|or|over|under|while|with)\b", re.IGNORECASE)
INDEX, GRIDS = "index.json", ("grid.mp4", "grid.gif")


def run(config: SampleConfig) -> None:
    """Write one mp4 for every (prompt, seed, number of calls), `grid.mp4`, `grid.gif` and `index.json`.

    Raises:
        UserError: `out` cannot be written or holds clips of another model, there is no prompt, the model or its codec
            cannot be loaded, or the size does not fit the model.
    """
    prompts, out = read_prompts(config), Path(config.out).expanduser()
    wanted = product(enumerate(prompts), config.seeds, config.calls)
    files = [_file(number, prompt, seed, steps) for (number, prompt), seed, steps in wanted]
    content = known_fact(partial(network_fact, config.model)) or Path(config.model).name
    owner = {"checkpoint": content, "weights": config.weights}
    check_results(out, INDEX, owner, [*files, *GRIDS])
    model = load_model(config.model, config.weights)
    device, dtype = pick_device(config.device, config.threads), autocast_dtype(config.precision)
    source = config.codec or find_codec(model.codec_source)
    codec = Codec.load(source, device, torch.float32)
    shape = clip_shape(ClipRequest(config.frames, config.height, config.width, config.chunk_partition), model, codec)
    start = _source(config, model)
    given = None if start is None else given_latents(start, codec, shape)
    texts = encode_texts(source, [*prompts, config.negative_prompt], config.text_length, device, dtype)
    negative = padded_condition(texts[-1:], config.text_length, device)
    flow_map = guided(on_device(model.network, device, dtype), negative, config.guidance_scale)
    sampler = partial(replace(model.sampler, chunks=shape.chunks), conditioning=given)
    maker = ClipMaker(flow_map, sampler, codec, config.text_length, config.shift)

    begin_results(out, INDEX, owner)
    videos: list[dict[str, Any]] = []
    rows: dict[str, list[Frames]] = {}
    for number, prompt in enumerate(prompts):
        for seed in config.seeds:
            row = _one_row(maker, texts[number], shape.noise(seed), config.calls)
            for steps, frames in zip(config.calls, row, strict=True):
                file = _file(number, prompt, seed, steps)
                write_mp4(out / file, frames, config.fps)
                videos.append({"file": file, "prompt": prompt, "steps": steps, "seed": seed})
            if len(rows) < GRID_ROWS:
                rows[prompt if len(config.seeds) == 1 else f"{prompt}, seed {seed}"] = row
    columns = [calls(steps) for steps in config.calls]
    write_grid(Grid(list(rows), columns, list(rows.values()), config.fps), *(out / name for name in GRIDS))
    made = owner | {"model": model.name, "step": model.step, **shape.size._asdict(), "videos": videos}
    write_json(out / INDEX, config.model_dump(mode="json", exclude={"out"}) | made)
    print(f"wrote {len(videos)} videos, grid.mp4, grid.gif and index.json to {out}")


def _file(number: int, prompt: str, seed: int, steps: int) -> str:
    return f"{slug(number, prompt)}_seed{seed}_calls{steps}.mp4"


def read_prompts(config: SampleConfig) -> list[str]:
    """List the prompt and the prompts, from a list or a file (one per line), without empty and repeated ones.

    Warns:
        ConfigWarning: parts of the list look like one sentence that was cut at its commas.

    Raises:
        UserError: the file cannot be read, or there is no prompt.
    """
    if any(_CONTINUES.match(part.strip()) for part in config.prompts[1:]):
        problem = f"{len(config.prompts)} prompts that look like one sentence, cut at its commas"
        problem += "; write prompt='...' for one"
        warnings.warn(str(UserError("prompts", problem)), ConfigWarning, stacklevel=2)
    prompts = distinct(part.strip() for part in [config.prompt, *captions.read_prompts(config.prompts, "prompts")])
    if not prompts:
        raise UserError("prompts", "is empty; give prompt='a prompt', or prompts=FILE with one prompt per line")
    return prompts


def _source(config: SampleConfig, model: LoadedNetwork) -> ConditioningSource | None:
    """Return the file with the conditioning frames of all clips; None if there is none.

    Raises:
        UserError: the model was trained without conditioning frames, or the file does not exist.
    """
    key = "image" if config.image is not None else "video"
    path = getattr(config, key)
    if path is None:
        return None
    if not model.sees_conditioning_frames:
        problem = f"'{path}', but {model.name} was trained without conditioning frames (context.i2v_probability=0)"
        raise UserError(key, f"{problem}; use another model, or leave out {key}")
    if not Path(path).expanduser().is_file():
        raise UserError(key, f"'{path}' does not exist or is not a file")
    frames = 1 if key == "image" else config.context_frames
    return ConditioningSource(key, Path(path), frames, config.fps)


def _one_row(maker: ClipMaker, text: Tensor, noise: Tensor, counts: Sequence[int]) -> list[Frames]:
    """Make the videos of one prompt and seed, one for each number of calls."""
    row = []
    for steps in counts:
        start = time.monotonic()
        row.append(maker.make(text, noise, steps))
        print(f"{calls(steps)}: {time.monotonic() - start:.1f} s", flush=True)
    return row
