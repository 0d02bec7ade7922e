"""`anyflow vbench`: write videos in VBench's layout, and score them at every number of calls."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anyflow_train.devices import autocast_dtype, pick_device
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.evaluation.clip_maker import ClipMaker, ClipRequest, Shape, clip_shape, encode_texts
from anyflow_train.evaluation.load import LoadedNetwork, load_model, on_device, unique_names
from anyflow_train.evaluation.sampling import padded_condition
from anyflow_train.evaluation.video import write_mp4
from anyflow_train.flow.sampler import guided
from anyflow_train.models.codec import Codec
from anyflow_train.text import timed_printer
from anyflow_vbench.config import Dimension, VBenchConfig
from anyflow_vbench.folder import Folder, digest
from anyflow_vbench.program import Result, VBench, find_vbench, read_result, score
from anyflow_vbench.prompts import Prompt, read_prompts
from anyflow_vbench.table import Column, label, write_table

SAY_SECONDS = 30.0


@dataclass(frozen=True)
class Candidate:
    """A model to measure, with the source of its codec, the shape of its clips, and a folder per number of calls."""

    model: LoadedNetwork
    source: str
    codec: Codec
    shape: Shape
    folders: list[Folder]


def run(config: VBenchConfig) -> list[Column]:
    """Write `<out>/<model>/<calls>/videos/{prompt}-{index}.mp4`, score them, write `vbench.json` and `vbench.md`.

    Existing videos and scores are kept.

    Raises:
        UserError: VBench, a file or a model is missing, or the folder has videos that were made with other settings.
        UserErrors: VBench failed for some dimensions; the table has the other dimensions.
    """
    say = timed_printer()
    device = pick_device(config.device, config.threads)
    vbench = find_vbench(config)
    prompts = read_prompts(config, vbench.info)
    candidates = _candidates(config, prompts, device)
    folders = [folder for candidate in candidates for folder in candidate.folders]
    with ExitStack() as held:
        for folder in folders:
            held.enter_context(folder.held())
        for candidate in candidates:
            _make_videos(config, candidate, prompts, device, say)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # free the memory of the networks for VBench
        columns, errors, commands = _score(config, vbench, folders, say)
    if commands:
        print(f"run these {len(commands)} commands to score the videos, then start this again for the table:")
        print("\n".join(commands))
    write_table(config, columns)
    if errors:
        raise UserErrors(errors)
    return columns


def _candidates(config: VBenchConfig, prompts: list[Prompt], device: torch.device) -> list[Candidate]:
    out = Path(config.out).expanduser().absolute()
    requested = ClipRequest(config.frames, config.height, config.width, config.chunk_partition)
    models = [load_model(source, config.weights) for source in config.models]
    found = []
    for name, model in zip(unique_names(models), models, strict=True):
        source = config.codec or model.codec_source
        codec = Codec.load(source, device, torch.float32)
        shape = clip_shape(requested, model, codec)
        folders = [
            Folder(
                out / name / str(calls),
                name,
                calls,
                _settings(config, model, shape, calls),
                prompts,
                config.videos,
                config.seed,
                closed=config.prompts is not None,
            )
            for calls in dict.fromkeys(config.calls)
        ]
        found.append(Candidate(model, source, codec, shape, folders))
    return found


def _settings(config: VBenchConfig, model: LoadedNetwork, shape: Shape, calls: int) -> dict[str, Any]:
    """Collect the settings that the videos depend on, except prompt and seed."""
    names = ("weights", "shift", "guidance_scale", "text_length", "precision")
    return {
        "model": model.name,
        "step": model.step,
        "weights_digest": digest(model.network),
        "calls": calls,
        **shape.size._asdict(),
        "chunk_partition": None if shape.chunks is None else shape.chunks.partition,
        "fps": config.fps,
        "negative_prompt": config.negative_prompt,
        **{name: getattr(config, name) for name in names},
    }


def _make_videos(
    config: VBenchConfig,
    candidate: Candidate,
    prompts: list[Prompt],
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Make the missing videos. The noise of a video is the same at every number of calls."""
    missing = {folder.calls: folder.missing() for folder in candidate.folders}
    total, done, said = sum(map(len, missing.values())), 0, time.monotonic()
    name = candidate.folders[0].model
    say(f"{name}: {total} videos to make" if total else f"{name}: all videos exist")
    if total == 0:
        return
    needed = sorted({prompt.text for videos in missing.values() for prompt, _ in videos})
    maker, texts = _maker(config, candidate, needed, device)
    for prompt in prompts:
        for index in range(config.videos):
            noise = candidate.shape.noise(prompt.seed(config.seed, index))
            for folder in candidate.folders:
                if (prompt, index) not in missing[folder.calls]:
                    continue
                frames = maker.make(texts[prompt.text], noise, folder.calls)
                write_mp4(folder.videos / prompt.file(index), frames, config.fps)
                done += 1
                if time.monotonic() - said > SAY_SECONDS:
                    say(f"{name}: {done} of {total} videos")
                    said = time.monotonic()
    nn.Module.to(candidate.model.network, "cpu")


def _maker(
    config: VBenchConfig, candidate: Candidate, texts: list[str], device: torch.device
) -> tuple[ClipMaker, dict[str, torch.Tensor]]:
    """Move the model to its device and encode the texts."""
    dtype, model = autocast_dtype(config.precision), candidate.model
    every = [*texts, config.negative_prompt]
    *encoded, negative = encode_texts(candidate.source, every, config.text_length, device, dtype)
    condition = padded_condition([negative], config.text_length, device)
    flow_map = guided(on_device(model.network, device, dtype), condition, config.guidance_scale)
    sampler = replace(model.sampler, chunks=candidate.shape.chunks)
    maker = ClipMaker(flow_map, sampler, candidate.codec, config.text_length, config.shift)
    return maker, dict(zip(texts, encoded, strict=True))


def _score(
    config: VBenchConfig, vbench: VBench, folders: list[Folder], say: Callable[[str], None]
) -> tuple[list[Column], list[UserError], list[str]]:
    """Score with one VBench process for each folder and dimension, so that a failure affects only one dimension.

    Returns:
        The columns, the errors, and the commands that were not run because of score=false.
    """
    columns, errors, commands = [], [], []
    for folder in folders:
        results: dict[Dimension, Result] = {}
        for dimension in config.chosen:
            out = folder.scores(dimension)
            known = read_result(out, dimension)
            command = vbench.command(folder.videos, folder.path / "prompts.json", dimension, out)
            if known is not None and known.files >= folder.files(dimension):
                results[dimension] = known
            elif not config.score:
                commands.append(shlex.join(command))
            else:
                say(f"{label(folder.model, folder.calls)}: {dimension}")
                try:
                    results[dimension] = score(command, dimension, out)
                except UserError as error:
                    errors.append(error)
        columns.append(Column(folder.model, folder.calls, results))
    return columns, errors, commands
