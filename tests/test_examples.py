"""The examples run, and the objective in one file is one like ours."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.__main__ import main
from anyflow_train.config.compose import compose
from anyflow_train.config.objectives import OURS, SavedObjective
from anyflow_train.config.own import as_run, load_objective, objective_class, run_model
from anyflow_train.config.rules.run import run_errors
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import ConfigWarning, UserError, UserErrors
from anyflow_train.objectives.types import Roles, Setting
from anyflow_train.training import run as training
from anyflow_train.training.checkpoints.config_file import decode_saved
from anyflow_train.training.checkpoints.resume import check_unchanged
from anyflow_train.training.checkpoints.run_directory import RunDirectory
from anyflow_train.training.networks import load_trained_network
from tests.objectives.toys import Recorded, SmallNetwork, batch_of, draw_of
from tests.training.helpers import assert_equal_runs, final_tensors, settings, write_latents, write_networks

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHORTCUT = "shortcut:Shortcut"
KINDS = (*OURS, SHORTCUT)
KNOWS_THE_KEYS_OF_TINY = ("flow_map", "lagrangian", "mixed")
TIMES = {"flow_matching": {"diffusion_share": 1.0, "consistency_share": 0.0}}


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def config_of(folder: Path, kind: str, **changes: Any) -> RunConfig:
    teacher = {"source": str(folder / "teacher"), "codec": "none"}
    values = settings(folder, objective={"kind": kind}, times=TIMES.get(kind, {}), teacher=teacher, **changes)
    return as_run(run_model(kind).model_validate(values))


def errors(*overrides: str) -> dict[str, str]:
    with pytest.raises(UserErrors) as caught:
        compose("train", ["experiment=tiny", *overrides])
    return {error.where: error.problem for error in caught.value.errors}


def test_a_loss_on_own_tensors() -> None:
    spec = importlib.util.spec_from_file_location("loss", EXAMPLES / "loss.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss = module.flow_map_loss()
    assert loss.isfinite()
    loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_checked_planned_and_says_its_facts(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["experiment=tiny", f"objective.kind={kind}"]
    with pytest.MonkeyPatch.context() if kind in KNOWS_THE_KEYS_OF_TINY else pytest.warns(ConfigWarning):
        config: RunConfig = compose("train", arguments)
    assert run_errors(config, 1) == []
    assert config.objective.any_step is (kind != "flow_matching")
    counts = config.objective.branch_counts(config.times, 32)
    assert (counts is None) is not config.objective.branches
    assert objective_class(config.objective).Config is type(config.objective)
    for command, options in (("check", []), ("plan", ["gpus=1"])):
        assert main([command, *arguments, *options]) == 0
        assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_resumes_exactly_and_is_loaded_without_its_class(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_latents(tmp_path / "shards")
    write_networks(tmp_path)
    for name, lengths in (("whole", (4,)), ("parts", (2, 4))):
        for steps in lengths:
            assert training.run(config_of(tmp_path, kind, name=name, steps=steps)) == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
    monkeypatch.delitem(sys.modules, "shortcut", raising=False)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(EXAMPLES)])
    network = load_trained_network(tmp_path / "whole")
    saved = RunDirectory(tmp_path / "whole").read_config()
    assert decode_saved(saved, "").model_dump(mode="json")["objective"] == saved["objective"]
    assert saved["objective"]["kind"] == kind
    weights = dict(network.named_parameters())
    averages = {name: t for name, t in final_tensors(tmp_path / "whole").items() if name.startswith("ema")}
    assert all(torch.equal(weights[name.partition(": ")[2]], average) for name, average in averages.items())
    assert "shortcut" not in sys.modules


def test_resuming_compares_an_own_objective_as_text(tmp_path: Path) -> None:
    config = config_of(tmp_path, SHORTCUT)
    saved = json.loads(config.model_dump_json())
    check_unchanged(saved, config, "")
    saved["objective"]["jumps"] = "student"
    with pytest.raises(UserErrors, match=r"objective.jumps: is 'ema', but the run began with 'student'"):
        check_unchanged(saved, config, "")


def test_a_saved_config_imports_nothing_and_cannot_be_trained(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text("raise AssertionError('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        config = RunConfig.model_validate(settings(tmp_path, objective={"kind": "loud:Objective", "own": [1, 2]}))
    finally:
        sys.path.remove(str(tmp_path))
    assert isinstance(config.objective, SavedObjective)
    assert config.model_dump()["objective"] == {"kind": "loud:Objective", "own": [1, 2], "schedule": ()}
    with pytest.raises(UserError, match="from a saved config, which imports no code"):
        objective_class(config.objective)


def test_keys_of_an_own_objective_are_checked_like_ours(capsys: pytest.CaptureFixture[str]) -> None:
    own = f"objective.kind={SHORTCUT}"
    found = errors(own, "objective.jump=ema", "objective.text_dropout=2", "steps=many")
    assert found["objective.jump"] == f"unknown key with objective.kind={SHORTCUT}; nearest is 'objective.jumps'"
    assert found.keys() == {"objective.jump", "objective.text_dropout", "steps"}
    assert "student, ema" in errors(own, "objective.jumps=emma")["objective.jumps"]
    assert "hides the target time" in errors(own, "student.gate_value=0")["student.gate_value"]
    assert "set times.distribution=uniform" in errors(own, "times.distribution=logit_normal")["times.distribution"]
    assert main(["train", own, "--help"]) == 0
    assert "objective.jumps: student | ema = ema" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no_such_module:Objective", "module 'no_such_module' of 'no_such_module:Objective' not found"),
        ("shortcut.inner:Objective", "module 'shortcut.inner' of 'shortcut.inner:Objective' not found"),
        ("shortcut:Shortcuts", "nearest is 'Shortcut'"),
        ("os:system", "is not a class"),
        ("subprocess:Popen", "has no class `Config`"),
        ("shortcut:ShortcutConfig", "has no class `Config`"),
        ("flow_mapp", "nearest is 'flow_map'"),
        ("os.system", f"valid are {', '.join(OURS)}, or my_package"),
    ],
)
def test_what_is_no_objective_is_one_sentence(
    kind: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*arguments: Any) -> None:
        raise AssertionError("called")

    monkeypatch.setattr("os.system", called)
    assert words in errors(f"objective.kind={kind}")["objective.kind"]
    assert main(["check", "experiment=tiny", f"objective.kind={kind}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_module_that_fails_is_named_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_objective.py").write_text("1 / 0")
    (tmp_path / "lacking_objective.py").write_text("import no_such_library")
    assert "ZeroDivisionError" in errors("objective.kind=broken_objective:Own")["objective.kind"]
    assert "module 'no_such_library' not found" in errors("objective.kind=lacking_objective:Own")["objective.kind"]
    assert str(tmp_path) not in sys.path


def test_an_installed_package_names_its_objectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "halves-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[anyflow_train.objectives]\nhalves = {SHORTCUT}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_objective("halves").__name__ == "Shortcut"
    with pytest.warns(ConfigWarning):
        config: RunConfig = compose("train", ["experiment=tiny", "objective.kind=halves"])
    assert (config.objective.kind, type(config.objective).__name__) == ("halves", "ShortcutConfig")
    assert f"valid are {', '.join(OURS)}, halves" in errors("objective.kind=halvez")["objective.kind"]


def test_keys_of_another_kind_are_left_out_and_typed_ones_refused() -> None:
    with pytest.warns(ConfigWarning, match=r"objective.kind: flow_matching does not have objective.epsilon"):
        compose("train", ["experiment=tiny", "objective=flow_matching"])
    assert errors("objective=flow_matching", "objective.epsilon=0.01").keys() == {"objective.epsilon"}
    with pytest.warns(ConfigWarning, match=r"on_policy.kind: none does not have on_policy.calls"):
        config: RunConfig = compose("train", ["experiment=tiny_on_policy", "on_policy=none"])
    assert config.on_policy.matching is None


def test_half_jumps_are_exact_where_the_velocity_is_constant() -> None:
    """On a flow of constant velocity every jump has that velocity, so the shortcut's loss at r < t is 0."""
    objective = load_objective(SHORTCUT)
    built = objective.build(objective.Config(kind=SHORTCUT), Setting(global_batch=8))
    constant = torch.full((2, 2, 2, 2), 0.7, dtype=torch.float64)
    flow_map = Recorded(lambda x, t, r, condition: constant.expand(len(x), *constant.shape))
    loss = built(Roles(flow_map, flow_map), batch_of(tuple(range(8))), draw_of(tuple(range(8))))
    assert loss.per_sample[4:].abs().max() < 1e-12
    assert loss.per_sample[:4].min() > 0.01
    x, t, r, _ = flow_map.calls[1]
    first = flow_map.calls[0]
    assert torch.allclose(t, first[2])
    assert torch.allclose(x, first[0] - (first[1] - t)[:, None, None, None, None] * 0.7)
    assert (r <= t).all()


def test_the_student_alone_has_a_gradient() -> None:
    objective = load_objective(SHORTCUT)
    built = objective.build(objective.Config(kind=SHORTCUT), Setting(global_batch=8))
    student, jumps = SmallNetwork(0), SmallNetwork(1)
    built(Roles(student, jumps), batch_of(tuple(range(8))), draw_of(tuple(range(8)))).per_sample.sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in jumps.parameters())
