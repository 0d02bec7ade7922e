"""Stages within a run: each trains with its own keys, and everything else goes on across a change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anyflow_train.config.derived import needs_teacher
from anyflow_train.config.run import RunConfig
from anyflow_train.config.schedule import mean_over, stages
from anyflow_train.errors import UserErrors
from anyflow_train.training.checkpoints import resume
from anyflow_train.training.checkpoints.reading import list_checkpoints, read_info
from anyflow_train.training.processes.world import ALONE
from anyflow_train.training.recipe import build_recipe
from tests.training.helpers import assert_equal_runs, on_policy, settings, train, write_latents

ONLY_T = {"times.diffusion_share": 1.0, "times.consistency_share": 0.0}
LONG_JUMPS = {"times.diffusion_share": 0.25, "times.consistency_share": 0.5, "objective.epsilon": 0.02}
SCHEDULE = [{"steps": 3, "changes": ONLY_T}, {"steps": 2, "changes": LONG_JUMPS}]


def scheduled(folder: Path, **changes: Any) -> dict[str, Any]:
    """Eight steps: three with r = t alone, two with longer jumps, and three with the run's own keys."""
    return settings(folder, **{"objective__schedule": SCHEDULE, "checkpoint": {"every": 1, "keep": 8}, **changes})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_latents(folder / "shards")
    return train(scheduled(folder))


def test_each_stage_has_its_steps_and_values(tmp_path: Path) -> None:
    found = stages(RunConfig.model_validate(scheduled(tmp_path)))
    assert [stage.steps for stage in found] == [range(3), range(3, 5), range(5, 8)]
    assert [stage.config.times.diffusion_share for stage in found] == [1.0, 0.25, 0.5]
    assert [getattr(stage.config.objective, "epsilon", None) for stage in found] == [0.005, 0.02, 0.005]
    short = RunConfig.model_validate(scheduled(tmp_path, steps=4))
    assert [stage.steps for stage in stages(short)] == [range(3), range(3, 4)]


def test_the_log_shows_the_branches_of_each_stage(undisturbed: Path) -> None:
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert ["loss_free" in row for row in rows] == [False] * 3 + [True] * 5
    assert all("loss_diffusion" in row for row in rows)


def test_a_stage_changes_the_shares_of_a_mix(tmp_path: Path) -> None:
    """Keys below a key, dotted or as a mapping; what is not named keeps the run's value."""
    write_latents(tmp_path / "shards")
    mix = {"kind": "mixed", "shares": {"flow_map": 0.5, "lagrangian": 0.0, "semigroup": 0.5}, "velocity": "data"}
    only = {"objective.shares.flow_map": 1.0, "objective.shares.semigroup": 0.0}
    schedule = [{"steps": 2, "changes": only}, {"steps": 1, "changes": {"objective.shares": {"semigroup": 0.5}}}]
    given = settings(tmp_path, objective={**mix, "schedule": schedule}, steps=4)
    found = [getattr(stage.config.objective, "shares", None) for stage in stages(RunConfig.model_validate(given))]
    assert [(shares.flow_map, shares.lagrangian, shares.semigroup) for shares in found if shares] == [
        (1.0, 0.0, 0.0),
        (0.5, 0.0, 0.5),
        (0.5, 0.0, 0.5),
    ]
    rows = [json.loads(line) for line in (train(given) / "metrics.jsonl").read_text().splitlines()]
    assert ["loss_semigroup" in row for row in rows] == [False, False, True, True]
    changes = {"objective.shares.semi": 0.5, "objective.epsilon.a": 1, "objective": {"epsilon": 0.1}, "optimizer.lr": 1}
    wrong = {**mix, "schedule": [{"steps": 2, "changes": changes}]}
    with pytest.raises(UserErrors) as caught:
        stages(RunConfig.model_validate(settings(tmp_path, objective=wrong)))
    assert [error.problem.split(":")[0] for error in caught.value.errors] == [
        "objective",
        "optimizer.lr",
        "objective.epsilon",
        "objective.shares.semi",
    ]


@pytest.mark.parametrize("after", [1, 3, 4, 5, 6])
def test_a_resume_in_any_stage_is_bit_equal(undisturbed: Path, tmp_path: Path, after: int) -> None:
    write_latents(tmp_path / "shards")
    train(scheduled(tmp_path, steps=after))
    assert_equal_runs(train(scheduled(tmp_path)), undisturbed)


def test_a_stage_is_a_run_with_its_keys_that_goes_on(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three runs without a schedule, each resumed from the one before although its keys differ, end bit-equal."""
    write_latents(tmp_path / "shards")
    monkeypatch.setattr(resume, "check_unchanged", lambda *_: None)
    first = {"diffusion_share": 1.0, "consistency_share": 0.0}
    second = {"diffusion_share": 0.25, "consistency_share": 0.5}
    for steps, times, epsilon in ((3, first, 0.005), (5, second, 0.02), (8, {}, 0.005)):
        run = train(settings(tmp_path, steps=steps, times=times, objective__epsilon=epsilon))
    assert_equal_runs(run, undisturbed)


def test_a_schedule_cannot_change_between_two_starts(tmp_path: Path) -> None:
    write_latents(tmp_path / "shards")
    train(scheduled(tmp_path, steps=2))
    with pytest.raises(UserErrors, match=r"objective\.schedule"):
        train(scheduled(tmp_path, objective__schedule=SCHEDULE[:1]))


def test_stages_go_on_beside_stage_2(tmp_path: Path) -> None:
    write_latents(tmp_path / "shards")
    schedule = [{"steps": 3, "changes": ONLY_T}]
    config = on_policy(tmp_path, objective__schedule=schedule, steps=6)
    first, second, fake = build_recipe(RunConfig.model_validate(config), ALONE).updates
    assert [update.role for update in (first, second, fake)] == ["student", "student", "fake_score"]
    assert [[update.due(step) for update in (first, second, fake)] for step in (2, 3)] == [
        [True, False, True],
        [False, True, True],
    ]
    whole = train(config)
    train(on_policy(tmp_path, objective__schedule=schedule, steps=4, name="halves"))
    assert_equal_runs(train(on_policy(tmp_path, objective__schedule=schedule, steps=6, name="halves")), whole)
    assert read_info(list_checkpoints(whole / "checkpoints")[-1]).state.step == 6


def test_a_teacher_of_one_stage_is_loaded(tmp_path: Path) -> None:
    follows = [{"steps": 3, "changes": {"objective.velocity": "teacher"}}]
    assert needs_teacher(RunConfig.model_validate(settings(tmp_path, objective__schedule=follows)))
    assert not needs_teacher(RunConfig.model_validate(scheduled(tmp_path)))


def test_operations_are_averaged_over_the_steps_of_a_log(tmp_path: Path) -> None:
    config = RunConfig.model_validate(scheduled(tmp_path))
    assert mean_over(config, (1.0, 2.0, 4.0), range(3)) == 1
    assert mean_over(config, (1.0, 2.0, 4.0), range(2, 6)) == (1 + 2 + 2 + 4) / 4
