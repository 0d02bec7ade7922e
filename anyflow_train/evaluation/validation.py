"""Validation during a run: samples at several numbers of calls from fixed noise, distances to held-out data, videos."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor

from anyflow_train.config.chunks import Chunks
from anyflow_train.config.derived import latent_shape
from anyflow_train.config.run import Evaluation, RunConfig
from anyflow_train.data.fingerprint import known_fingerprint
from anyflow_train.data.held_out import HeldOut, good_samples, load_samples
from anyflow_train.data.loader import pad_text
from anyflow_train.data.manifest import check_compatible
from anyflow_train.data.shards import ShardSet, open_shards
from anyflow_train.errors import UserError
from anyflow_train.evaluation.clip_choice import balanced_order, cycle, strata
from anyflow_train.evaluation.intervals import Estimate, percentile
from anyflow_train.evaluation.low_memory import decode_in_parts, free_cache, sample_in_parts, warn
from anyflow_train.evaluation.measure import SampleEvaluator
from anyflow_train.evaluation.oracle import judge_clips
from anyflow_train.evaluation.sampling import EULER, clip_sampler, draw_noise
from anyflow_train.evaluation.teacher_reference import TeacherReference, measure_against, teacher_reference
from anyflow_train.evaluation.video import Grid, to_frames, write_grid
from anyflow_train.flow.causal import Sampler
from anyflow_train.flow.sampler import guided
from anyflow_train.flow.types import Condition, FlowMap, take
from anyflow_train.models.codec import Codec
from anyflow_train.text import calls
from anyflow_train.training.engine import zero_stage
from anyflow_train.training.processes.world import World, collect_rows, shared_rows
from anyflow_train.training.validation import ShowPart, Validation

# With this many held-out clips, the samples are the main source of noise in the distances.
MOST_HELD_OUT = 2048
SMALLER = "the run goes on; evaluation.every=0 leaves out validation"


@dataclass(frozen=True)
class Prompts:
    """Texts to sample, and the noise of each of them: the same at each validation and in `anyflow evaluate`.

    Attributes:
        captions: n texts.
        text: (n, L, D) float32 embeddings, zero where padded.
        noise: (n, F, C, H, W) float32.
    """

    captions: tuple[str, ...]
    text: Tensor
    noise: Tensor

    def __getitem__(self, rows: Sequence[int]) -> Prompts:
        """Select some of the prompts."""
        return Prompts(tuple(self.captions[row] for row in rows), take(self.text, rows), take(self.noise, rows))


@dataclass(frozen=True)
class InRunValidator:
    """Compares a student with held-out data, and makes videos of the manifest's validation prompts.

    The processes of a run share the samples; rank 0 measures and writes.

    Attributes:
        config: config of the validation.
        world: the processes of the run.
        sampler: sampler of the student.
        negative: negative prompt, text (1, L, D).
        held_out: clips that samples are compared with; None leaves out the distances to them.
        reference: the teacher's fine solutions, which samples are compared with instead; None without them.
        compared: prompts of the samples that are compared; None if there is nothing to compare with.
        shown: prompts of the videos; None without videos.
        codec: decodes videos, on the GPU only while it does; None if nothing is decoded.
        fps: frames per second of the videos.
    """

    config: Evaluation
    world: World
    sampler: Sampler
    negative: Condition
    held_out: HeldOut | None
    reference: TeacherReference | None
    compared: Prompts | None
    shown: Prompts | None
    codec: Codec | None
    fps: float

    def __call__(
        self,
        student: FlowMap,
        folder: Path,
        interrupted: Callable[[], bool],
        show: ShowPart = lambda part, parts: None,
    ) -> Validation | None:
        """Sample, measure, and write a grid of videos into `folder`.

        Args:
            student: the student.
            folder: folder for the videos.
            interrupted: whether the validation must end.
            show: shows which set of samples is being made, of all sets.

        Returns:
            The results. None once `interrupted` returns True, or, after a warning, if the memory is not sufficient.
        """
        try:
            self._complete_reference(interrupted)
            parts = len(self.config.calls) * sum(prompts is not None for prompts in (self.compared, self.shown))
            numbers = count(1)

            def begin() -> None:
                show(next(numbers), parts)

            compared = self._sample_all(student, self.compared, interrupted, begin)
            shown = self._sample_all(student, self.shown, interrupted, begin)
        except _Interrupted:
            return None
        return self.world.on_main(lambda: self._result(compared, shown, folder))

    def _result(self, compared: Mapping[int, Tensor], shown: Mapping[int, Tensor], folder: Path) -> Validation | None:
        try:
            with nullcontext() if self.codec is None else self.codec.on(self.world.device):
                metrics, videos = self._metrics(compared), self._videos(shown, folder)
        except torch.OutOfMemoryError:
            warn(f"decoding does not fit into memory, left out; {SMALLER}")
            return None
        finally:
            free_cache()
        values = {name: estimate.value for name, estimate in metrics.items()}
        intervals = {f"{name}_{end}": getattr(metrics[name], end) for name in metrics for end in ("low", "high")}
        return Validation(values, videos, intervals)

    @cached_property
    def _evaluator(self) -> SampleEvaluator:
        """The measures of `anyflow evaluate`, prepared at the first validation on the process that measures."""
        assert self.held_out is not None
        assert self.compared is not None
        groups = strata(list(self.compared.captions), self.held_out.captions)
        return SampleEvaluator(self.held_out.latents, *groups, seed=self.config.seed)

    def _metrics(self, samples: Mapping[int, Tensor]) -> dict[str, Estimate]:
        """Compute metrics from samples by number of calls. Returns them by name, `<metric>_<steps>`."""
        if self.compared is None:
            return {}
        metrics: dict[str, Estimate] = {}
        if self.reference is not None:
            decode = partial(decode_in_parts, self.codec) if self.codec and self.config.reference_videos else None
            metrics |= measure_against(self.reference.latents(), samples, self.compared.captions, self.config, decode)
        for steps, latents in samples.items():
            if self.held_out is not None:
                found = self._evaluator.sampled(latents, self.config.shift)
                metrics[f"energy_distance_{steps}"] = percentile(found.energy)
                metrics[f"sliced_wasserstein_{steps}"] = self._evaluator.sliced_wasserstein(latents)
            if self.config.oracle != "none" and self.codec is not None:
                judge = partial(judge_clips, decode=partial(decode_in_parts, self.codec), batch=self.config.batch)
                seen = judge(latents, list(self.compared.captions)).accuracy
                metrics[f"class_error_{steps}"] = Estimate(1 - seen.value, 1 - seen.high, 1 - seen.low)
        return metrics

    def _videos(self, samples: Mapping[int, Tensor], folder: Path) -> dict[str, Path]:
        """Write a grid of videos: rows are prompts, columns are numbers of calls."""
        if self.shown is None or self.codec is None:
            return {}
        codec = self.codec
        columns = [[to_frames(decode_in_parts(codec, one[None])[0]) for one in latents] for latents in samples.values()]
        rows = [list(row) for row in zip(*columns, strict=True)]
        grid = Grid(self.shown.captions, [calls(steps) for steps in samples], rows, self.fps)
        path = folder / "grid.mp4"
        write_grid(grid, path, folder / "grid.gif")
        return {"grid": path}

    def _sample_all(
        self, student: FlowMap, prompts: Prompts | None, interrupted: Callable[[], bool], begin: Callable[[], None]
    ) -> dict[int, Tensor]:
        """Sample latents (n, F, C, H, W) float32 on the CPU by number of calls, equal on all processes."""
        if prompts is None:
            return {}
        flow_map = guided(student, self.negative, self.config.guidance_scale)
        samples: dict[int, Tensor] = {}
        for steps in self.config.calls:
            begin()
            samples[steps] = self._sample(self.sampler, flow_map, prompts, steps, interrupted)
        return samples

    def _complete_reference(self, interrupted: Callable[[], bool]) -> None:
        """Make the teacher's solutions that the run directory lacks."""
        reference, compared = self.reference, self.compared
        if reference is None or compared is None:
            return

        def solve(rows: Sequence[int]) -> Tensor:
            return self._sample(EULER, reference.teacher, compared[rows], self.config.reference_calls, interrupted)

        reference.complete(solve, self.config.batch * self.world.data_size, self.world)

    def _sample(
        self, sampler: Sampler, flow_map: FlowMap, prompts: Prompts, steps: int, interrupted: Callable[[], bool]
    ) -> Tensor:
        device, communicates = self.negative.text.device, zero_stage() == 3 or self.world.sequence_parallel > 1

        def solve(text: Tensor, noise: Tensor) -> Tensor:
            x0 = sampler(flow_map, noise.to(device), Condition(text.to(device)), steps, self.config.shift)
            return x0.float().cpu()

        batches = list(zip(prompts.text.split(self.config.batch), prompts.noise.split(self.config.batch), strict=True))
        mine = []
        for index in shared_rows(len(batches), self.world):
            if interrupted():
                raise _Interrupted
            # the other processes take part in a forward that communicates, so one process alone cannot repeat it
            mine.append(
                _sample_whole(solve, *batches[index]) if communicates else sample_in_parts(solve, *batches[index])
            )
        found = [part for part in collect_rows(len(batches), mine, self.world) if part is not None]
        if len(found) < len(batches):
            warn(f"one sample does not fit into memory, left out; {SMALLER}")
            raise _Interrupted
        return torch.cat(found)


def _sample_whole(solve: Callable[[Tensor, Tensor], Tensor], text: Tensor, noise: Tensor) -> Tensor:
    try:
        return solve(text, noise)
    except torch.OutOfMemoryError as error:
        problem = f"{len(text)} samples of validation need more memory than the GPU has; use a smaller value"
        raise UserError("evaluation.batch", f"{problem}, or evaluation.every=0 ({error})") from error


class _Interrupted(Exception):
    """The validation ends without a result."""


def build_validator(config: RunConfig, world: World, teacher: FlowMap | None = None) -> InRunValidator:
    """Load the data and networks of the validation, so that errors appear before the first training step.

    Args:
        config: config of the run.
        world: the processes of the run.
        teacher: velocity of the run's teacher; needed for `evaluation.reference=teacher`.

    Raises:
        UserError: held-out shards or the codec cannot be read or do not fit the run.
    """
    evaluation, length = config.evaluation, max(config.data.text_lengths)
    shards = open_shards(config.data, config.data.locations[0])
    negative = Condition(pad_text(shards.texts.negative, length)[None].to(world.device))
    held_out, reference, compared = _load_held_out(config), None, None
    if held_out is not None:
        texts = [pad_text(text, length) for text in held_out.texts]
        compared = _prompts("evaluation", held_out.captions, texts, evaluation.samples, config)
    if evaluation.reference == "teacher":
        assert teacher is not None
        compared, held_out = compared or _training_prompts(config, shards, length), None
        reference = teacher_reference(config, teacher, negative, compared.text)
    shown, videos = None, min(evaluation.videos, len(shards.texts.validation))
    if videos:
        texts = [pad_text(text, length) for text in shards.texts.validation]
        shown = _prompts("validation video", shards.manifest.validation_prompts, texts, videos, config)
    decodes = shown is not None or evaluation.oracle != "none" or (reference and evaluation.reference_videos)
    codec = _load_codec(config) if decodes else None
    return InRunValidator(
        config=evaluation,
        world=world,
        sampler=clip_sampler(Chunks.of(config.student.architecture), config.objective.any_step),
        negative=negative,
        held_out=held_out,
        reference=reference,
        compared=compared,
        shown=shown,
        codec=codec,
        fps=shards.manifest.fps or 16.0,
    )


def _load_held_out(config: RunConfig) -> HeldOut | None:
    location, key = config.evaluation.held_out, "evaluation.held_out"
    if location is None:
        return None
    shards = open_shards(config.data, location)
    vae = known_fingerprint(config.teacher.codec_source, "vae")
    check_compatible(shards.manifest, config.data, config.student.architecture, vae, key)
    shards = shards.of_size(config.data.size)
    if len(shards) < 2:
        problem = f"{location} holds {len(shards)} clips of {config.data.size}"
        raise UserError(key, f"{problem}, but a distance needs two or more")
    return load_samples(shards, min(len(shards), MOST_HELD_OUT))


def _training_prompts(config: RunConfig, shards: ShardSet, length: int) -> Prompts:
    """Take the first prompts of the training data; shards of prompts without video are enough."""
    samples = list(islice(good_samples(shards, "validation"), config.evaluation.samples))
    if not samples:
        raise UserError("data.shards", f"{shards.location} holds no readable prompt; run `anyflow prepare` again")
    texts = [pad_text(sample.text, length) for sample in samples]
    return _prompts("evaluation", [sample.caption for sample in samples], texts, config.evaluation.samples, config)


def _prompts(purpose: str, captions: Sequence[str], texts: Sequence[Tensor], count: int, config: RunConfig) -> Prompts:
    """Take `count` prompts as `anyflow evaluate` does, with noise from `evaluation.seed`."""
    shape = latent_shape(config.data, config.student.architecture.in_channels)
    rows = cycle(balanced_order(list(captions)), count)
    noise = draw_noise(count, shape, config.evaluation.seed, purpose)
    return Prompts(tuple(captions[row] for row in rows), torch.stack([texts[row] for row in rows]), noise)


def _load_codec(config: RunConfig) -> Codec:
    source = config.teacher.codec_source
    if source is None:
        raise UserError("teacher.codec", "is not set, but validation decodes videos; name a pipeline folder")
    return Codec.load(source, torch.device("cpu"), torch.float32)
