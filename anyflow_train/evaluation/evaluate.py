"""`anyflow evaluate`: compares a teacher and its students at several numbers of calls, from the same noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from anyflow_train.config.commands import EvaluateConfig
from anyflow_train.config.keys import show
from anyflow_train.data.held_out import HeldOut, check_count
from anyflow_train.data.shards import ShardSet
from anyflow_train.devices import autocast_dtype, pick_device
from anyflow_train.errors import UserError
from anyflow_train.evaluation.by_chunk import measure_chunks
from anyflow_train.evaluation.clip_choice import (
    balanced_order,
    check_frames,
    cycle,
    reference_and_inputs,
    strata,
    varied,
)
from anyflow_train.evaluation.intervals import percentile
from anyflow_train.evaluation.load import LoadedNetwork, load_model, on_device, unique_names
from anyflow_train.evaluation.measure import ResultRow, SampleEvaluator, SampleSet
from anyflow_train.evaluation.nearest import TrainingSet, nearest_distances, open_training, summarise
from anyflow_train.evaluation.oracle import Recognition, judge_clips
from anyflow_train.evaluation.plot import COLOURS
from anyflow_train.evaluation.report import TEACHER, EvaluationReport, owner, write_report
from anyflow_train.evaluation.sampling import EULER, Inputs, Watched, draw_noise, padded_condition, sample_all
from anyflow_train.evaluation.video import Grid, Heading, to_frames, write_grid
from anyflow_train.files import begin_results, check_results
from anyflow_train.flow.sampler import guided
from anyflow_train.flow.types import FlowMap
from anyflow_train.models.codec import Codec
from anyflow_train.text import calls
from anyflow_train.training.checkpoints.reading import read_network, resolve_checkpoint
from anyflow_train.training.checkpoints.run_directory import runs_of_sweep
from anyflow_train.training.reporting.tasks import TaskProgress
from anyflow_train.training.weight_source import is_run

FILES = ("report.md", "grid.mp4", "grid.gif", "quality.png", "chunks.png")
GRID_COLUMNS = 3
"""Numbers of calls of each model in the grid, the smallest ones; the teacher's fine solution is added."""


@dataclass(frozen=True)
class Comparison:
    """Inputs and measures that all models share.

    Attributes:
        config: config of the evaluation.
        held_out: the held-out clips.
        captions: captions of the samples.
        inputs: noise and texts of the samples.
        conditioning: (n, P, C, H, W), clean first frames for students; None if they generate all frames.
        fine: the teacher's fine solution for the same noise.
        evaluator: measures samples.
        judge: checks what decoded latents show, given latents and captions; None leaves it out.
        progress: shows how far the evaluation is.
    """

    config: EvaluateConfig
    held_out: HeldOut
    captions: list[str]
    inputs: Inputs
    conditioning: Tensor | None
    fine: SampleSet
    evaluator: SampleEvaluator
    judge: Callable[[Tensor, list[str]], Recognition] | None
    progress: TaskProgress

    def rows(
        self, model: str, sets: Mapping[int, SampleSet], teacher: Mapping[int, SampleSet] | None = None
    ) -> list[ResultRow]:
        """Measure a model's samples, given by number of calls. The ratio needs the samples of the teacher."""
        self.progress.say_timed(f"measuring {model}")
        fine, taught = self.fine.latents, teacher or {}
        with self.progress.doing("measuring"):
            return [
                self.evaluator.cell(
                    model, n, samples, fine, taught.get(n), self.recognise(samples.latents, self.captions)
                )
                for n, samples in sets.items()
            ]

    def recognise(self, latents: Tensor, captions: list[str]) -> Recognition | None:
        """Ask the oracle what the first `oracle_samples` of (n, F, C, H, W) latents show; None without an oracle."""
        return self.judge and self.judge(latents, captions[: self.config.oracle_samples])


def run(config: EvaluateConfig) -> EvaluationReport:
    """Evaluate, and write the page `report.md` with its pictures and numbers into `config.out` (`write_report`).

    If a model is causal, each chunk is also measured separately and drawn in `chunks.png`.

    Raises:
        UserError: a model, the shards or the codec cannot be loaded.
    """
    start = time.monotonic()
    out, device = Path(config.out).expanduser(), pick_device(config.device, config.threads)
    dtype = autocast_dtype(config.precision)
    sources = [str(run) for source in config.models for run in runs_of_sweep(source) or [source]]
    teachers_source = config.teacher or _teacher_of(sources)
    config = config.model_copy(update={"teacher": teachers_source})
    check_results(out, "report.json", owner(config), FILES)
    shards = ShardSet.open(config.held_out)
    check_count(shards, len(shards), config.held_out_samples)
    training = None if config.training_shards is None else open_training(config.training_shards, shards)
    models = [load_model(source, config.weights) for source in sources]
    check_frames(config, shards, models)
    taught = load_model(teachers_source, config.weights)
    if taught.chunks is not None:
        raise UserError("teacher", f"{teachers_source} is a causal student; name a network that is not causal")
    codec = Codec.load(config.codec or taught.codec_source, device, torch.float32)
    teacher = on_device(taught.network, device, dtype)
    negative = padded_condition([shards.texts.negative], config.text_length, device)
    teacher = guided(teacher, negative, config.guidance_scale)

    with TaskProgress("network calls", network_calls(config, models), config.log) as progress:
        teacher = Watched(teacher, progress.advance)
        say = progress.say_timed
        say(f"reading {config.held_out_samples} held-out samples and sampling the teacher's fine solution")
        comparison = prepare(config, shards, teacher, codec, device, progress)
        sets = {TEACHER: {steps: best_shift(comparison, teacher, steps) for steps in config.calls}}
        cells = comparison.rows(TEACHER, sets[TEACHER])
        for name, model in zip(_student_names(models), models, strict=True):
            sets[name] = sample_student(
                comparison, model, Watched(on_device(model.network, device, dtype), progress.advance)
            )
            cells += comparison.rows(name, sets[name], sets[TEACHER])
        cells += comparison.rows(TEACHER, {config.fine_steps: comparison.fine})
        trained_on = None
        if training is not None:
            samples = [*(sampled for by_steps in sets.values() for sampled in by_steps.values()), comparison.fine]
            cells, trained_on = with_nearest(comparison, training, cells, samples)
        chunks = next((model.chunks.partition for model in models if model.chunks is not None), None)
        by_chunk = () if chunks is None else measure_chunks(chunks, comparison.evaluator, sets)
        progress.phase("measuring")
        judged = comparison.recognise(comparison.evaluator.reference, comparison.held_out.captions)
        real = comparison.evaluator.real(judged)
        report = EvaluationReport(config, tuple(cells), time.monotonic() - start, real, trained_on, by_chunk)
        begin_results(out, "report.json", owner(config))
        _write_grid(comparison, codec, sets, shards.manifest.fps or 16.0, out)
        page = write_report(out, report)
        say(f"wrote {out}/report.md with its pictures, and report.json")
    progress.result(page)
    return report


def _teacher_of(models: Sequence[str]) -> str:
    """Return the teacher that runs were trained with. Raises UserError if there is none, or more than one."""
    runs = [read_network(resolve_checkpoint(model)) for model in models if is_run(model)]
    found = sorted({run.teacher for run in runs if run.teacher is not None})
    if len(found) != 1:
        none = f"no run among {show(tuple(models))} names its own"
        had = f"the models had several: {', '.join(found)}" if found else none
        raise UserError("teacher", f"null, and {had}; name a Wan2.1 folder or hub id")
    return found[0]


def network_calls(config: EvaluateConfig, models: Sequence[LoadedNetwork]) -> int:
    """Count the network calls of an evaluation; a call with a batch counts once per sample."""
    shifts = [(steps, config.shifts if steps > 1 else config.shifts[:1]) for steps in config.calls]
    chunks = [1 if model.chunks is None else len(model.chunks.partition) for model in models]
    calls = config.fine_steps + sum(steps * len(tried) for steps, tried in shifts) + sum(config.calls) * sum(chunks)
    reference = 0 if config.reference == "data" else config.held_out_samples * config.fine_steps
    return config.samples * calls + reference


def prepare(
    config: EvaluateConfig,
    shards: ShardSet,
    teacher: FlowMap,
    codec: Codec,
    device: torch.device,
    progress: TaskProgress,
) -> Comparison:
    """Make the comparison that all models share, and sample the teacher's fine solution.

    Captions come from held-out samples, each caption about equally often.
    """
    held_out, sources = reference_and_inputs(config, shards)
    rows = cycle(balanced_order(sources.captions), config.samples)
    captions = [sources.captions[row] for row in rows]
    shape = tuple(held_out.latents.shape[1:])
    noise = draw_noise(config.samples, shape, config.seed, "evaluation")
    inputs = Inputs(noise, [sources.texts[row] for row in rows], config.text_length, config.batch, device)
    conditioning = sources.latents[rows][:, : config.conditioning_frames] if config.conditioning_frames else None
    fine = sample_all(EULER, teacher, inputs, config.fine_steps, config.shift)
    reference = _reference(config, held_out, teacher, device)
    evaluator = SampleEvaluator(reference, *strata(captions, held_out.captions), config.bootstrap, config.seed)
    judge = partial(judge_clips, decode=codec.decode_video, batch=8) if config.oracle != "none" else None
    sampled = evaluator.sampled(fine, config.shift)
    return Comparison(config, held_out, captions, inputs, conditioning, sampled, evaluator, judge, progress)


def best_shift(comparison: Comparison, teacher: FlowMap, steps: int) -> SampleSet:
    """Sample the teacher at each shift, and return the set with the lowest energy distance.

    A single step always goes from 1 to 0, so it needs only one shift.
    """
    shifts = comparison.config.shifts if steps > 1 else comparison.config.shifts[:1]
    found = []
    for shift in shifts:
        latents = sample_all(EULER, teacher, comparison.inputs, steps, shift)
        found.append(comparison.evaluator.sampled(latents, shift))
        distance = percentile(found[-1].energy).as_distance()
        comparison.progress.say_timed(f"teacher, {calls(steps)}, shift {shift:g}: energy distance {distance}")
    return min(found, key=lambda samples: float(samples.energy[0]))


def sample_student(comparison: Comparison, model: LoadedNetwork, flow_map: FlowMap) -> dict[int, SampleSet]:
    """Sample a student at each number of calls, without guidance: guidance is part of the student's weights."""
    inputs, sets = replace(comparison.inputs, conditioning=comparison.conditioning), {}
    for steps in comparison.config.calls:
        latents = sample_all(model.sampler, flow_map, inputs, steps, comparison.config.shift)
        sets[steps] = comparison.evaluator.sampled(latents, comparison.config.shift)
        distance = percentile(sets[steps].energy).as_distance()
        comparison.progress.say_timed(f"{model.name}, {calls(steps)}: energy distance {distance}")
    return sets


def with_nearest(
    comparison: Comparison, training: ShardSet, cells: list[ResultRow], samples: list[SampleSet]
) -> tuple[list[ResultRow], TrainingSet]:
    """Add the distances to the training clips to the cells of samples, and measure those of the held-out clips."""
    comparison.progress.say_timed(f"searching for the nearest of {len(training)} training clips")
    evaluator = comparison.evaluator
    sets = [comparison.held_out.latents, *(sampled.latents for sampled in samples)]
    of_held_out, *of_samples = nearest_distances(training, sets)
    measured = [
        replace(cell, nearest=summarise(distances, evaluator.resampling))
        for cell, distances in zip(cells, of_samples, strict=True)
    ]
    return measured, TrainingSet(len(training), summarise(of_held_out, evaluator.reference_resampling))


def _student_names(models: list[LoadedNetwork]) -> list[str]:
    return [f"{name} (student)" if name == TEACHER else name for name in unique_names(models)]


def _reference(config: EvaluateConfig, held_out: HeldOut, teacher: FlowMap, device: torch.device) -> Tensor:
    """Return the held-out samples, or fine guided samples of the teacher with their captions, from other noise."""
    if config.reference == "data":
        return held_out.latents
    shape = tuple(held_out.latents.shape[1:])
    noise = draw_noise(config.held_out_samples, shape, config.seed, "reference")
    inputs = Inputs(noise, held_out.texts, config.text_length, config.batch, device)
    return sample_all(EULER, teacher, inputs, config.fine_steps, config.shift)


def _write_grid(
    comparison: Comparison, codec: Codec, sets: dict[str, dict[int, SampleSet]], fps: float, out: Path
) -> None:
    """Write videos of a few captions. Columns are numbers of calls of the teacher and the first student."""
    rows = varied(comparison.captions, comparison.config.videos)
    if not rows:
        return
    columns, videos, headings = [], [], []
    # Two colours, so that the loop ends with the first student, or with the teacher if there is none.
    for (name, by_steps), colour in zip(sets.items(), COLOURS[:2], strict=False):
        drawn = {steps: by_steps[steps] for steps in sorted(by_steps)[:GRID_COLUMNS]}
        drawn |= {comparison.config.fine_steps: comparison.fine} if name == TEACHER else {}
        headings.append(Heading(name, len(drawn), colour))
        for steps, samples in drawn.items():
            videos.append([to_frames(video) for video in codec.decode_video(samples.latents[rows])])
            columns.append(calls(steps))
    grid = Grid([comparison.captions[row] for row in rows], columns, list(zip(*videos, strict=True)), fps, headings)
    write_grid(grid, out / "grid.mp4", out / "grid.gif")
