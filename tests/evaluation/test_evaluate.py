"""A whole evaluation on small random networks: its files, and numbers that must be equal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.config.commands import EvaluateConfig
from anyflow_train.config.run import RunConfig
from anyflow_train.data.held_out import load_samples
from anyflow_train.data.manifest import PromptTexts
from anyflow_train.data.shards import Sample, ShardSet
from anyflow_train.errors import UserError
from anyflow_train.evaluation import evaluate
from anyflow_train.evaluation.clip_choice import balanced_order, cycle
from anyflow_train.evaluation.load import load_model, on_device
from anyflow_train.evaluation.report import EvaluationReport
from anyflow_train.evaluation.validation import build_validator
from anyflow_train.flow.causal import ClipSampler
from anyflow_train.tiny import shapes as world
from anyflow_train.training.checkpoints.config_file import under_new_names
from anyflow_train.training.processes.world import World
from tests.export.runs import CHUNKS, FULL, make_run
from tests.shards import describe, write_shards

SHAPE = (2, 16, 4, 4)
CAPTIONS = [world.CAPTIONS[label] for label in (0, 5, 13)]


def write_held_out(folder: Path, count: int, shape: tuple[int, ...] = SHAPE) -> Path:
    """Shards of random latents with captions of the moving shapes."""
    generator = torch.Generator().manual_seed(0)
    captions = [CAPTIONS[number % len(CAPTIONS)] for number in range(count)]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    samples = [Sample(f"clip-{n:03d}", draw(*shape), draw(3, 64), caption) for n, caption in enumerate(captions)]
    return write_shards(folder, [samples], describe(shape, 64, longest_text=3), PromptTexts(torch.zeros(1, 64), ()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its teacher at `base`, held-out shards, and training shards that begin with the same clips."""
    root = tmp_path_factory.mktemp("evaluate")
    make_run(root, FULL)
    write_held_out(root / "held_out", 24)
    write_held_out(root / "training", 30)
    return root


def run(folder: Path, out: str, **options) -> EvaluationReport:
    settings = {
        "models": (str(folder / "run"),),
        "teacher": str(folder / "base"),
        "held_out": str(folder / "held_out"),
        "calls": (1, 2),
        "samples": 10,
        "held_out_samples": 24,
        "fine_steps": 4,
        "shifts": (1.0, 5.0),
        "bootstrap": 50,
        "batch": 4,
        "text_length": 8,
        "videos": 2,
        "device": "cpu",
        "precision": "fp32",
    }
    return evaluate.run(EvaluateConfig(out=str(folder / out), **{**settings, **options}))


def test_the_teacher_is_that_of_the_runs_if_none_is_named(folder: Path, tmp_path: Path):
    report = run(folder, "unnamed", teacher=None)
    assert report.config.teacher == str(folder / "base")
    with pytest.raises(UserError, match=r"^teacher: null, and no run among \[.*base\] names its own; name a Wan2"):
        run(folder, "none", teacher=None, models=(str(folder / "base"),))
    make_run(tmp_path, FULL)  # with a teacher of its own
    with pytest.raises(UserError, match=r"^teacher: null, and the models had several: /.*/base, /.*/base; name"):
        run(folder, "several", teacher=None, models=(str(folder / "run"), str(tmp_path / "run")))
    assert not (folder / "several").exists()


def test_an_evaluation_leaves_its_report_plot_and_grid(folder: Path):
    run(folder, "whole", oracle="shapes")
    report = json.loads((folder / "whole" / "report.json").read_text())
    names = [(cell["model"], cell["steps"]) for cell in report["cells"]]
    assert names == [("teacher", 1), ("teacher", 2), ("run", 1), ("run", 2), ("teacher", 4)]
    student = report["cells"][3]
    for measure in ("energy_distance", "sliced_wasserstein", "trajectory_error"):
        assert student[measure]["low"] <= student[measure]["value"] <= student[measure]["high"]
    assert 0 <= student["recognition"]["accuracy"]["low"] <= 1
    assert 0 <= report["real"]["recognition"]["accuracy"]["low"] <= 1
    assert report["real"]["energy_floor"] > 0
    assert report["cells"][0]["energy_ratio"] is None
    assert report["cells"][4]["trajectory_error"]["value"] == 0
    for name in ("report.md", "quality.png", "grid.mp4", "grid.gif"):
        assert (folder / "whole" / name).stat().st_size > 0


def test_the_teacher_as_its_own_student_is_as_good_as_itself(folder: Path):
    # A Wan network as a student is the flow map of its velocity at gate 0: Euler steps. With one shift for both, all
    # numbers must be equal, and the paired interval of their ratio has no width.
    report = run(folder, "same", models=(str(folder / "base"),), shifts=(5.0,), videos=0)
    teacher, student = report.cells[1], report.cells[3]
    assert student.energy_distance == teacher.energy_distance
    assert student.energy_ratio is not None
    assert (student.energy_ratio.low, student.energy_ratio.high) == (1, 1)
    assert not (folder / "same" / "grid.mp4").exists()


def test_fine_guided_samples_are_near_the_guided_reference(folder: Path):
    report = run(folder, "guided", reference="guided_teacher", guidance_scale=3.0, videos=0, calls=(2,))
    fine = report.cells[-1].energy_distance
    # Equal distributions, drawn from other noise: zero is within the interval.
    assert fine.low <= 0 <= fine.high


def test_too_few_held_out_clips_are_said_before_a_model_is_read(folder: Path):
    with pytest.raises(UserError, match="holds 24 good samples of 25; lower held_out_samples"):
        run(folder, "few", held_out_samples=25, models=(str(folder / "nowhere"),))


def test_distances_to_training_clips_stand_beside_those_of_held_out_clips(folder: Path):
    run(folder, "near", training_shards=str(folder / "training"), models=(), videos=0, calls=(1,))
    report = json.loads((folder / "near" / "report.json").read_text())
    assert [(cell["model"], cell["steps"]) for cell in report["cells"]] == [("teacher", 1), ("teacher", 4)]
    # Every held-out clip is in the training shards. No sample of a random network is.
    assert report["training"]["clips"] == 30
    assert report["training"]["held_out"]["mean"]["high"] < 1e-4
    for cell in report["cells"]:
        near = cell["nearest"]
        assert 1 < near["minimum"] <= near["percentile_1"]["value"] <= near["mean"]["value"] < near["mean"]["high"]
    table = (folder / "near" / "report.md").read_text()
    assert "| real clips |" in table
    assert "nearest of 30 training clips" in table


def test_a_student_called_teacher_is_told_from_the_teacher(folder: Path):
    (folder / "teacher").symlink_to(folder / "base")
    report = run(folder, "named", models=(str(folder / "teacher"),), videos=0, calls=(1,))
    assert [cell.model for cell in report.cells] == ["teacher", "teacher (student)", "teacher"]


def test_validation_during_a_run_gives_the_numbers_of_the_report(folder: Path):
    """The same noise, captions, estimators and intervals, so that a run and its report never disagree."""
    cells = run(folder, "agree", videos=0, shifts=(5.0,), bootstrap=1000).cells[2:4]
    (saved,) = (folder / "run" / "checkpoints").glob("*/config.json")
    settings = under_new_names(json.loads(saved.read_text()), str(saved))
    settings["data"] |= {"shards": str(folder / "held_out"), "text_lengths": [8]}
    settings["evaluation"] = {
        "held_out": str(folder / "held_out"),
        "calls": [1, 2],
        "samples": 10,
        "batch": 3,
        "videos": 0,
    }
    settings["teacher"]["codec"] = "none"  # nothing is decoded
    settings["evaluation"]["best_metric"] = "energy_distance_1"
    validator = build_validator(RunConfig.model_validate(settings), World(torch.device("cpu")))
    student = on_device(load_model(str(folder / "run"), "ema").network, torch.device("cpu"), None)
    with torch.inference_mode():
        validation = validator(student, folder / "agree", lambda: False)
    assert validation is not None
    for cell in cells:
        for measure in ("energy_distance", "sliced_wasserstein"):
            name, estimate = f"{measure}_{cell.steps}", getattr(cell, measure)
            found = [validation.metrics[name], *(validation.intervals[f"{name}_{end}"] for end in ("low", "high"))]
            assert found == pytest.approx([estimate.value, estimate.low, estimate.high], abs=1e-4)


def test_results_do_not_depend_on_the_batch(folder: Path):
    cells = [run(folder, f"batch{batch}", batch=batch, videos=0, calls=(2,)).cells for batch in (3, 10)]
    for left, right in zip(*cells, strict=True):
        assert left.energy_distance.value == pytest.approx(right.energy_distance.value, abs=1e-4)


def test_a_causal_model_is_measured_chunk_by_chunk_and_goes_on_from_conditioning_frames(tmp_path: Path):
    make_run(tmp_path, FULL, causal=CHUNKS)
    held_out = ShardSet.open(str(write_held_out(tmp_path / "held_out", 24, (3, *SHAPE[1:]))))
    report = run(tmp_path, "free", videos=0)
    cells = {(cell.model, cell.steps, cell.chunk): cell.energy_distance for cell in report.chunks}
    assert set(cells) == {
        (model, steps, chunk) for model in ("teacher", "run") for steps in (1, 2) for chunk in (1, 2, 3)
    }
    assert (tmp_path / "free" / "chunks.png").stat().st_size > 0
    assert "| model   | calls | chunk 1" in (tmp_path / "free" / "report.md").read_text()

    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        sampled = evaluate.sample_all

        def watched(sampler: ClipSampler, *arguments: Any) -> torch.Tensor:
            latents = sampled(sampler, *arguments)
            if sampler.chunks is not None:
                seen.append(latents)
            return latents

        patch.setattr(evaluate, "sample_all", watched)
        run(tmp_path, "given", videos=0, conditioning_frames=2, held_out_samples=14)
    begun = load_samples(held_out, 24).part(slice(14, None))  # not those that samples are compared with
    rows = cycle(balanced_order(begun.captions), 10)
    assert len(seen) == 2
    assert all(torch.equal(latents[:, :2], begun.latents[rows][:, :2]) for latents in seen)
    assert "continue 2 latent frames" in (tmp_path / "given" / "report.md").read_text()


def test_frames_that_leave_none_to_generate_are_refused(folder: Path):
    with pytest.raises(UserError, match="conditioning_frames: 2 of the clips' 2 latent frames leave none"):
        run(folder, "all", conditioning_frames=2)
    with pytest.raises(UserError, match=r"conditioning_frames: 1 needs 10 clips .*, together 34; .* holds 24"):
        run(folder, "few", conditioning_frames=1)


def test_a_causal_teacher_is_refused(tmp_path: Path):
    make_run(tmp_path, FULL, causal=CHUNKS)
    write_held_out(tmp_path / "held_out", 24, (3, *SHAPE[1:]))
    with pytest.raises(UserError, match=r"teacher: .* is a causal student"):
        run(tmp_path, "taught", teacher=str(tmp_path / "run"))


def test_conditioning_frames_that_end_inside_of_a_chunk_are_refused_before_anything_is_sampled(tmp_path: Path):
    make_run(tmp_path, FULL, causal={"chunk_partition": [1, 2], "full_chunk_limit": 2})
    write_held_out(tmp_path / "held_out", 24, (3, *SHAPE[1:]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "sample_all", None)
        with pytest.raises(
            UserError, match=r"conditioning_frames: run: 2 latent frames do not end at a chunk of \[1, 2\]"
        ):
            run(tmp_path, "inside", conditioning_frames=2)


def test_chunks_of_other_clips_are_refused(tmp_path: Path):
    make_run(tmp_path, FULL, causal={"chunk_partition": [1, 2, 2], "full_chunk_limit": 2})
    write_held_out(tmp_path / "held_out", 24, (3, *SHAPE[1:]))
    with pytest.raises(UserError, match=r"models: run makes clips of the chunks \[1, 2, 2\], .* 3 latent frames"):
        run(tmp_path, "other")
