"""`anyflow prepare`: the command with the networks that can make clips from prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from anyflow_train.commands.shards import LABEL, write_contact_sheet
from anyflow_train.config.commands import PrepareConfig
from anyflow_train.config.derived import latent_shape
from anyflow_train.data.index import Skipped
from anyflow_train.data.prepare import command
from anyflow_train.data.prepare.job import make_plan
from anyflow_train.data.prepare.older import SETTINGS
from anyflow_train.data.prepare.output_lock import compare_settings
from anyflow_train.data.prepare.sources import format_counts
from anyflow_train.data.prepare.texts import captions_of
from anyflow_train.data.prepare.video import read_windows
from anyflow_train.data.prepare.videos import Maker, stacked, with_pixels
from anyflow_train.data.prepare.windows import Framing
from anyflow_train.data.shards import Sample
from anyflow_train.devices import autocast_dtype
from anyflow_train.evaluation.load import load_teacher, on_device
from anyflow_train.evaluation.sampling import Inputs, draw_noise, padded_condition, sample_all
from anyflow_train.evaluation.video import to_frames
from anyflow_train.files import read_json
from anyflow_train.flow.draw import draw_key
from anyflow_train.flow.sampler import guided
from anyflow_train.text import MOST_NAMED, some
from anyflow_train.training.weight_source import open_source

PICTURES = 16
MOST_TRIED = 64


def run(config: PrepareConfig) -> None:
    """Write shards. Raises UserError, KeyboardInterrupt or SystemExit, as `data.prepare.command.run` does."""
    if config.dry_run:
        dry_run(config)
    else:
        if config.teacher is not None:
            open_source(config.teacher)  # a wrong name is said before the texts are encoded
        command.run(config, teacher_latents)


def dry_run(config: PrepareConfig) -> None:
    """Print what would be encoded, and write the first pictures of some of these clips as training would see them.

    Raises:
        UserError: there are no clips, or the folder was started with other settings.
    """
    plan = make_plan(config)
    if (plan.folder / SETTINGS).exists() and next(plan.folder.glob("*.index.json"), None) is not None:
        compare_settings(plan, read_json(plan.folder / SETTINGS))
    changes = plan.changes()
    print(f"{plan.folder} would get {len(changes.new) + len(changes.changed)} of {len(plan.source.clips)} clips")
    for name in ("new", "changed", "skipped", "gone"):
        keys: Sequence[str] = getattr(changes, name)
        print(f"  {len(keys)} {name}" + (f": {', '.join(some(keys))}" if keys else ""))
    for problem in plan.source.problems[:MOST_NAMED]:
        print(f"  not listed: {problem.key}: {problem.reason}")
    if plan.source.unused:
        print(f"  not used: {format_counts(plan.source.unused)}")
    pending = {*changes.new, *changes.changed}
    clips = [clip for clip in plan.source.clips if clip.key in pending and clip.video is not None]
    pictures, labels, read = [], [], partial(read_windows, framing=Framing.of(config))
    # Evenly spaced clips, and some others in place of those that cannot be used.
    tried = {clip.key: clip for clip in [*clips[:: max(1, len(clips) // PICTURES)], *clips[:MOST_TRIED]]}
    for key, clip in tried.items():
        if len(pictures) == PICTURES:
            break
        captions = captions_of(clip)
        texts = Skipped(key, captions) if isinstance(captions, str) else Sample(key, None, torch.empty(0), captions[0])
        found = next(with_pixels(read, clip, texts))
        if isinstance(found, Skipped):
            print(f"  {key} cannot be used: {found.reason}")
        elif found.latents is not None:
            labels.append(f"{key}: {found.caption}"[:LABEL])
            pictures.append(to_frames(found.latents[:, :1])[0])
    if pictures:
        path = plan.folder.with_name(f"{plan.folder.name}.dry_run.png")
        write_contact_sheet(path, pictures, labels)
        print(f"contact sheet of {len(pictures)} clips: {path}")


def teacher_latents(config: PrepareConfig, device: torch.device, negative: Tensor) -> Maker:
    """Load the teacher, and return the functions that make latents from texts.

    Noise and size of a sample depend on (seed, key) alone, so the result does not depend on processes and batches,
    apart from rounding.

    Raises:
        UserError: the teacher cannot be loaded.
    """
    teacher, length = load_teacher(config.teacher or ""), config.max_text_length
    shapes = [latent_shape(size, teacher.network.config["in_channels"]) for size in config.sizes]
    flow_map = on_device(teacher.network, device, autocast_dtype(config.precision))
    flow_map = guided(flow_map, padded_condition([negative], length, device), config.guidance_scale)

    def start(sample: Sample) -> Sample:
        shape = shapes[draw_key(config.seed, sample.key, "size") % len(shapes)]
        return replace(sample, latents=draw_noise(1, shape, config.seed, f"prepare {sample.key}")[0])

    def make(samples: list[Sample]) -> Tensor:
        texts = [sample.text for sample in samples]
        inputs = Inputs(stacked(samples), texts, length, len(samples), device)
        return sample_all(teacher.sampler, flow_map, inputs, config.steps, config.shift)

    return start, make
