"""Validation against the teacher's fine solutions, with teachers and students whose samples are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_train.config.run import Evaluation, RunConfig
from anyflow_train.data.manifest import PromptTexts
from anyflow_train.data.shards import Sample
from anyflow_train.evaluation.intervals import resample, single_stratum
from anyflow_train.evaluation.teacher_reference import appearance, measure_against, paired_energy_distance
from anyflow_train.evaluation.validation import InRunValidator, build_validator
from anyflow_train.flow.types import Condition, FlowMap
from anyflow_train.training import run as training
from anyflow_train.training.checkpoints.reading import list_checkpoints, read_info
from anyflow_train.training.processes.world import ALONE
from tests.shards import describe, write_shards
from tests.training.helpers import SHAPE, TEXT_DIM, settings, write_latents, write_networks

EVALUATION = {
    "every": 1,
    "reference": "teacher",
    "reference_calls": 8,
    "reference_videos": 0,
    "calls": [2, 8],
    "samples": 6,
    "batch": 2,
    "videos": 0,
}


def validator_of(
    folder: Path, teacher: FlowMap, changes: dict[str, Any] | None = None, **others: Any
) -> InRunValidator:
    if not (folder / "shards").exists():
        write_latents(folder / "shards", samples=5)
    config = settings(folder, evaluation={**EVALUATION, **(changes or {})}, teacher={"source": "teacher"}, **others)
    return build_validator(RunConfig.model_validate(config), ALONE, teacher)


def curved(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
    """Return a velocity whose Euler solution depends on the number of steps and on the text. It ignores r."""
    return x * t[:, None, None, None, None] + by_text(x, t, r, condition) / 10


def by_text(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
    """Return a constant velocity: the sum of the text."""
    return condition.text.sum((1, 2))[:, None, None, None, None].expand_as(x)


def measured(validator: InRunValidator, student: FlowMap, folder: Path) -> dict[str, float]:
    validation = validator(student, folder, lambda: False)
    assert validation is not None
    return validation.metrics


def test_a_student_equal_to_its_teacher_has_no_error_at_the_reference_calls(tmp_path: Path) -> None:
    metrics = measured(validator_of(tmp_path, curved), curved, tmp_path)
    assert metrics["rms_8"] == metrics["energy_distance_8"] == 0
    assert metrics["rms_2"] > 0.01


def test_the_reference_holds_the_guidance_of_the_objective(tmp_path: Path) -> None:
    """With text sums a and negative sum 1, a guided constant velocity is `1 + w (a - 1)`."""
    objective = {"kind": "flow_map", "guidance": "target", "guidance_scale": 3.0}
    validator = validator_of(tmp_path, by_text, objective=objective)

    def guided(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        return 3 * by_text(x, t, r, condition) - 2 * validator.negative.text.sum()

    assert measured(validator, guided, tmp_path)["rms_2"] == pytest.approx(0, abs=1e-4)
    plain = validator_of(tmp_path / "plain", by_text)
    assert measured(plain, by_text, tmp_path)["rms_2"] == pytest.approx(0, abs=1e-4)
    sampled_with = validator_of(tmp_path / "sampled", by_text, {"guidance_scale": 3.0})
    assert measured(sampled_with, by_text, tmp_path)["rms_2"] == pytest.approx(0, abs=1e-4)


class Counting:
    """The curved teacher, which counts its samples, and asks to stop after some calls."""

    def __init__(self, calls: int = 1000) -> None:
        self.samples, self.calls = 0, calls

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        assert torch.equal(t, r)  # a student that is used as a teacher depends on r
        self.samples, self.calls = self.samples + len(x), self.calls - 1
        return curved(x, t, r, condition)

    def interrupted(self) -> bool:
        return self.calls <= 0


def test_an_interrupted_reference_is_continued(tmp_path: Path) -> None:
    """Three batches of two samples, of eight calls each; the stop comes before the third."""
    first, second, third = Counting(16), Counting(), Counting()
    assert validator_of(tmp_path, first)(curved, tmp_path, first.interrupted) is None
    metrics = measured(validator_of(tmp_path, second), curved, tmp_path)
    assert (first.samples, second.samples) == (4 * 8, 2 * 8)
    assert metrics["rms_8"] == 0
    assert measured(validator_of(tmp_path, third, {"batch": 4}), curved, tmp_path) == metrics
    assert third.samples == 0


@pytest.mark.parametrize(
    ("changes", "others"),
    [
        ({"reference_calls": 4}, {}),
        ({"seed": 1}, {}),
        ({"shift": 2.0}, {}),
        ({"guidance_scale": 2.0}, {}),
        ({}, {"teacher__source": "another"}),
        ({}, {"engine": {"global_batch": 8, "micro_batch": 4, "precision": "bf16"}}),
    ],
)
def test_solutions_of_other_facts_are_made_again(
    tmp_path: Path, changes: dict[str, Any], others: dict[str, Any]
) -> None:
    measured(validator_of(tmp_path, curved), curved, tmp_path)
    again = Counting()
    measured(validator_of(tmp_path, again, changes, **others), curved, tmp_path)
    assert again.samples > 0


def write_texts(folder: Path, value: float, negative: float) -> None:
    """Replace the shards: equal captions, whose embeddings are encoded again."""
    samples = [Sample(f"clip-{n}", torch.zeros(SHAPE), torch.full((3, TEXT_DIM), value), "clip") for n in range(5)]
    texts = PromptTexts(torch.full((1, TEXT_DIM), negative), ())
    write_shards(folder / "shards", [samples], describe(SHAPE, TEXT_DIM, longest_text=3), texts)


@pytest.mark.parametrize(
    ("value", "negative", "scale", "again"),
    [(2.0, 0.0, 1.0, True), (1.0, 1.0, 3.0, True), (1.0, 1.0, 1.0, False), (1.0, 0.0, 3.0, False)],
)
def test_solutions_of_other_texts_are_made_again(
    tmp_path: Path, value: float, negative: float, scale: float, again: bool
) -> None:
    """The negative prompt matters only if the teacher is guided."""
    counted = []
    for texts in ((1.0, 0.0), (value, negative)):
        write_texts(tmp_path, *texts)
        teacher = Counting()
        measured(validator_of(tmp_path, teacher, {"guidance_scale": scale}), curved, tmp_path)
        counted.append(teacher.samples)
    assert counted[0] > 0
    assert (counted[1] > 0) == again


def test_a_damaged_solution_is_made_again(tmp_path: Path) -> None:
    metrics = measured(validator_of(tmp_path, curved), curved, tmp_path)
    files = sorted((tmp_path / "run" / "teacher_reference").iterdir())
    assert len(files) == 6
    files[1].write_bytes(files[1].read_bytes()[:100])
    files[4].write_bytes(b"")
    again = Counting()
    assert measured(validator_of(tmp_path, again), curved, tmp_path) == metrics
    assert again.samples == 2 * 8


def test_prompts_are_enough(tmp_path: Path) -> None:
    """Shards of prompts without video, and fewer of them than samples."""
    samples = [Sample(f"prompt-{n}", None, torch.randn(3, TEXT_DIM), f"prompt {n}") for n in range(4)]
    manifest = describe(SHAPE, TEXT_DIM, longest_text=3)
    nothing = dict.fromkeys(("latent_shape", "latent_dtype", "frames", "height", "width", "fps"))
    prompts = manifest.model_copy(update={"kind": "prompts", **nothing})
    write_shards(tmp_path / "shards", [samples], prompts, PromptTexts(torch.zeros(1, TEXT_DIM), ()))
    validator = validator_of(tmp_path, curved)
    assert validator.compared is not None
    assert validator.compared.captions == ("prompt 0", "prompt 1", "prompt 2", "prompt 3", "prompt 0", "prompt 1")
    assert measured(validator, curved, tmp_path)["rms_8"] == 0


def test_held_out_prompts_are_taken_where_there_are_some(tmp_path: Path) -> None:
    held_out = write_latents(tmp_path / "held_out", samples=3)
    validator = validator_of(tmp_path, curved, {"held_out": str(held_out)})
    assert validator.compared is not None
    assert validator.compared.captions == ("clip 0", "clip 1", "clip 2") * 2
    assert measured(validator, curved, tmp_path)["energy_distance_8"] == 0


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return the unbiased distance of independent samples (n, D) and (m, D)."""
    own = [torch.cdist(each, each).sum() / (len(each) * (len(each) - 1)) for each in (x, y)]
    return float(2 * torch.cdist(x, y).mean() - own[0] - own[1])


def test_the_paired_distance_is_unbiased() -> None:
    """Over many sets, the mean distance of pairs that share their noise is that of independent large sets."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randn(count, 2, generator=generator, dtype=torch.float64)

    found = []
    for _ in range(2000):
        noise = draw(8)
        plain = resample(single_stratum(8), 1, 0)
        found.append(paired_energy_distance(noise, 1.5 * noise + 0.5, plain)[0].item())
    expected = energy_distance(draw(3000), 1.5 * draw(3000) + 0.5)
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.1)
    biased = [energy_distance(noise, 1.5 * noise + 0.5) for noise in (draw(8) for _ in range(500))]
    assert sum(biased) / len(biased) < expected - 0.1


def identity(video: Tensor) -> Tensor:
    return video


@pytest.fixture
def clips() -> Tensor:
    """Three "latents" (3, 3, F, H, W), which are their own videos."""
    return torch.rand(3, 3, 5, 6, 6, generator=torch.Generator().manual_seed(0)) - 0.5


def looks(fine: Tensor, samples: Tensor, decode: Callable[[Tensor], Tensor] | None = identity) -> dict[str, float]:
    found = measure_against(fine, {4: samples}, ["a", "b", "c"], Evaluation(reference_videos=3), decode)
    return {name.removesuffix("_4"): estimate.value for name, estimate in found.items()}


def test_rms_is_the_root_of_the_mean_square_of_all_numbers(clips: Tensor) -> None:
    far = clips.clone()
    far[0] += 0.6
    assert looks(clips, far, None)["rms"] == pytest.approx((0.36 / 3) ** 0.5)


def test_doubled_contrast_is_two(clips: Tensor) -> None:
    doubled = looks(clips, 2 * clips + 0.3)
    assert [doubled[name] for name in ("contrast", "saturation", "motion")] == pytest.approx([2, 2, 2])
    assert looks(clips, clips)["contrast"] == 1


def test_a_frozen_clip_has_no_motion(clips: Tensor) -> None:
    frozen = looks(clips, clips[:, :, :1].expand_as(clips).contiguous())
    assert frozen["motion"] == 0
    assert frozen["contrast"] == pytest.approx(1, rel=0.2)


def test_over_saturated_clips_are_seen(clips: Tensor) -> None:
    """Colours twice as far from the brightness keep contrast and change saturation alone."""
    brightness = (clips * torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None, None]).sum(1, keepdim=True)
    found = looks(clips, brightness + 2 * (clips - brightness))
    assert found["saturation"] == pytest.approx(2)
    assert found["contrast"] == pytest.approx(1)
    assert looks(clips, brightness.expand_as(clips).contiguous())["saturation"] == pytest.approx(0, abs=1e-6)


def test_images_have_no_motion_and_without_a_codec_nothing_is_decoded(clips: Tensor) -> None:
    assert "motion" not in appearance(clips[:, :, :1], identity)
    assert looks(clips, clips, None).keys() == {"energy_distance", "rms"}


def run_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A stage-1 run on data, whose teacher is only the reference."""
    write_networks(folder)
    evaluation = {**EVALUATION, "every": 2, "reference_calls": 4, "calls": [1, 2], "best_metric": "rms_2"}
    teacher = {"source": str(folder / "teacher"), "codec": "none"}
    return settings(folder, evaluation=evaluation, teacher=teacher, **changes)


def test_a_run_keeps_the_best_checkpoint_by_its_teacher(tmp_path: Path) -> None:
    write_latents(tmp_path / "shards")
    config = RunConfig.model_validate(run_settings(tmp_path))
    training.run(config.model_copy(update={"steps": 4}), build_validator)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "teacher_reference").iterdir()}
    training.run(config, build_validator)
    run = tmp_path / "run"
    assert {file: file.stat().st_mtime_ns for file in (run / "teacher_reference").iterdir()} == before
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rms = {line["step"]: line["validation/rms_2"] for line in lines if "validation/rms_2" in line}
    assert rms.keys() == {2, 4, 6, 8}
    best = read_info(list_checkpoints(run / "checkpoints")[-1]).state.best
    assert best is not None
    assert (best.step, best.value) == min(rms.items(), key=lambda row: row[1])
