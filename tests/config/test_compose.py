"""Composition and its errors: every error at once, with dotted keys."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anyflow_train.config.compose import compose
from anyflow_train.config.groups import config_files
from anyflow_train.config.network import FullTraining, Lora
from anyflow_train.config.paths import resource
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError, UserErrors

TINY = "experiment=tiny"


def errors(*overrides: str, command: str = "train", config_dir: Path | None = None) -> dict[str, str]:
    """Dotted key -> message."""
    with pytest.raises(UserError) as caught:
        compose(command, overrides, config_dir)
    several = caught.value.errors if isinstance(caught.value, UserErrors) else [caught.value]
    return {error.where: error.problem for error in several}


def test_values_groups_and_experiments_are_laid_over_each_other() -> None:
    config: RunConfig = compose("train", [TINY, "student/adapter=lora", "student.adapter.rank=8", "optimizer.lr=3e-4"])
    assert isinstance(config.student.adapter, Lora)
    assert (config.student.adapter.rank, config.optimizer.lr, config.name) == (8, 3e-4, "tiny")


def test_a_group_on_the_command_line_wins_over_the_experiment() -> None:
    config: RunConfig = compose("train", ["tracker=wandb", "experiment=wan1_3b_forward", "student/adapter=full"])
    assert config.student.adapter == FullTraining()
    assert config.tracker.kind == "wandb"


def test_plus_signs_change_nothing() -> None:
    assert compose("train", [TINY, "++log_every=3"]) == compose("train", [TINY, "+log_every=3"])


def test_assets_are_absolute_and_user_paths_stay_as_written() -> None:
    config: RunConfig = compose("train", [TINY, "data.shards=here/shards", "out=../runs"])
    assert Path(config.teacher.source or "").is_absolute()
    assert Path(config.teacher.source or "").name == "tiny-wan"
    assert config.student.init == config.teacher.source
    assert (config.data.shards, config.out) == ("here/shards", "../runs")


def test_one_key_moves_student_and_teacher_to_the_output_of_stage_0() -> None:
    config: RunConfig = compose("train", ["experiment=wan1_3b_forward", "teacher.source=/exports/teacher"])
    assert config.student.init == config.teacher.codec_source == "/exports/teacher"


def test_field_errors_and_rule_errors_come_together() -> None:
    found = errors(
        TINY,
        "optimizer.ll=3",
        "lr=2",
        "optimizer.lr=abc",
        "objective.weight=beta",
        "steps=1.5",
        "seed=true",
        "optimizer.betas=[1,2,3]",
        "data.text_lengths=[a,16]",
        "times.diffusion_share=.9",
        "data.frames=18",
        "engine.global_batch=32",
        "engine.micro_batch=5",
        "a=b=c",
        "noequals",
        "evaluation.shift=${foo.bar}",
    )
    assert set(found) == {
        "optimizer.ll",
        "lr",
        "optimizer.lr",
        "objective.weight",
        "steps",
        "seed",
        "optimizer.betas",
        "data.text_lengths.0",
        "times.consistency_share",
        "data.frames",
        "engine.global_batch",
        "a",
        "noequals",
        "evaluation.shift",
    }
    assert found["optimizer.ll"] == "unknown key; nearest is 'optimizer.lr'"
    assert found["lr"] == "unknown key; nearest is 'optimizer.lr'"
    assert found["optimizer.lr"] == "'abc' is wrong: it should be a valid number"
    assert "nearest is 'beta08'" in found["objective.weight"]


def test_a_rule_about_a_wrong_key_is_not_reported_twice() -> None:
    found = errors(TINY, "engine.global_batch=many", "engine.micro_batch=5")
    assert set(found) == {"engine.global_batch"}


# In groups that do not disturb each other, because each composition takes a moment.
ONE_BY_ONE: list[dict[str, tuple[str, str]]] = [
    {
        "student=tinyy": ("student", "nearest is 'tiny'"),
        "student/adapter=lor": ("student/adapter", "nearest is 'lora'"),
        "optimizer=null": ("optimizer", "not a choice of this group; valid are "),
        "data={}": ("data", "not a choice of this group"),
        "times.shift=1,2": ("times.shift", "`anyflow sweep`"),
        "engine=cpu,gpu": ("engine", "`anyflow sweep`"),
        "~steps": ("~steps", "cannot be removed"),
        "=3": ("=3", "key=value"),
        "name=it's": ("name", "in quotes"),
        "tracker@x=none": ("tracker@x=none", "key=value"),
        "hydra.run.dir=x": ("hydra.run.dir", "<out>/<name>"),
        "optimizer.lr=nan": ("optimizer.lr", "finite"),
    },
    {
        "student.init=${asset}": ("student.init", "cannot be resolved"),
        "student.adapter.rank=3": ("student.adapter.rank", "with student.adapter.kind=full"),
        "optimiser.lr=1": ("optimiser.lr", "nearest is 'optimizer.lr'"),
        "optimizer.ema=3": ("optimizer.ema", "it should be an object"),
        "optimizer.lr=-1": ("optimizer.lr", "greater than 0"),
        "name='a b'": ("name", "letters, digits"),
        "seed='3'": ("seed", "valid integer"),
        "steps=null": ("steps", "null is wrong"),
        "objective.kind=flow": ("objective.kind", "valid are flow_matching, flow_map"),
        "student.gradient_checkpointing=true": ("student.gradient_checkpointing", "valid are none, block, selective"),
    },
]


@pytest.mark.parametrize("cases", ONE_BY_ONE)
def test_errors_one_by_one(cases: dict[str, tuple[str, str]]) -> None:
    found = errors(TINY, *cases)
    assert set(found) == {key for key, _ in cases.values()}
    for key, words in cases.values():
        assert words in found[key]


def test_values_that_nobody_gave_are_named() -> None:
    assert errors() == {"name": "missing: give name=...", "steps": "missing: give steps=..."}
    assert set(errors(command="evaluate")) == {"out", "models", "held_out"}


def test_an_unknown_experiment_names_the_nearest_and_judges_only_what_was_written() -> None:
    found = errors("experiment=tinny", "lr=3")
    assert set(found) == {"experiment", "lr"}
    assert "nearest is 'tiny'" in found["experiment"]


def test_an_experiment_of_another_command_says_whose_it_is() -> None:
    assert "is for `anyflow prepare`, not for `anyflow train`" in errors("experiment=tiny_prepare")["experiment"]


def test_own_config_folder(tmp_path: Path) -> None:
    experiment = tmp_path / "experiment" / "mine.yaml"
    experiment.parent.mkdir()
    experiment.write_text(
        "# @package _global_\ndefaults:\n  - tiny\n  - override /tracker: tensorboard\nname: mine\nsteps: 7\n"
    )
    config: RunConfig = compose("train", ["experiment=mine"], tmp_path)
    assert (config.name, config.steps, config.tracker.kind, config.data.frames) == ("mine", 7, "tensorboard", 17)
    experiment.write_text("# @package _global_\ndefaults:\n  - override /student: tinyy\n")
    assert "nearest is 'tiny'" in errors("experiment=mine", config_dir=tmp_path)["student"]
    experiment.write_text("# @package _global_\nname: [mine\n")
    assert "mine.yaml" in str(errors("experiment=mine", config_dir=tmp_path))
    assert "not a folder" in errors(config_dir=tmp_path / "absent")["--config-dir"]


def test_an_own_file_with_a_shipped_name_is_refused_unless_it_is_a_copy(tmp_path: Path) -> None:
    own = tmp_path / "experiment" / "tiny.yaml"
    shutil.copytree(resource("configs"), tmp_path, dirs_exist_ok=True)
    assert compose("train", [TINY], tmp_path).steps == 400
    own.write_text(own.read_text().replace("steps: 400", "steps: 7"))
    (tmp_path / "train.yaml").write_text("steps: 7\n")
    found = errors(TINY, config_dir=tmp_path)
    assert found.keys() == {str(own), str(tmp_path / "train.yaml")}
    assert "has the name of a shipped config" in found[str(own)]


@pytest.mark.parametrize("header", ["", "# my experiment\n", "# anyflow train: mine\n"])
def test_a_forgotten_package_line_is_said(tmp_path: Path, header: str) -> None:
    own = tmp_path / "experiment" / "mine.yaml"
    own.parent.mkdir()
    own.write_text(f"{header}defaults:\n  - tiny\nsteps: 7\n")
    assert f"{own} lacks the line `# @package _global_`" in errors("experiment=mine", config_dir=tmp_path)["experiment"]
    own.write_text(f"# @package _global_\n{header}defaults:\n  - tiny\nsteps: 7\n")
    assert compose("train", ["experiment=mine"], tmp_path).steps == 7


def test_files_of_editors_are_ignored_and_unreadable_ones_named(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / ".#x.yaml").symlink_to("me@host.1:2")
    (tmp_path / "experiment" / "._x.yaml").write_bytes(b"\xff")
    assert compose("train", [TINY], tmp_path).steps == 400
    (tmp_path / "experiment" / "x.yaml").write_bytes(b"\xff\xfe")
    assert "cannot be read" in errors(TINY, config_dir=tmp_path)[str(tmp_path / "experiment" / "x.yaml")]


@pytest.mark.parametrize("text", ["", '""', "''"])
def test_empty_values_from_unset_shell_variables_are_refused(text: str) -> None:
    found = errors(TINY, f"data.shards={text}", f"name={text}", f"student.init={text}")
    assert found.keys() == {"data.shards", "name", "student.init"}
    assert all("a shell variable that is not set" in problem for problem in found.values())
    found = errors("experiment=tiny_prepare", f"source={text}", "out=o", f"negative_prompt={text}", command="prepare")
    assert found.keys() == {"source"}


def test_the_launchers_processes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    problem = errors(TINY, "engine.global_batch=32", "engine.micro_batch=16")["engine.global_batch"]
    assert "x 3 processes = 48; nearest are 48; or start 2 processes (anyflow plan: gpus=2)" in problem
    monkeypatch.setenv("WORLD_SIZE", "none")
    assert "not a number of processes" in errors(TINY)["WORLD_SIZE"]


def test_composition_and_its_errors_need_no_torch() -> None:
    program = (
        "import sys\n"
        "from anyflow_train.__main__ import main\n"
        "code = main(['check', 'experiment=wan14b_forward', 'lr=1'])\n"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: lr: unknown key; nearest is 'optimizer.lr'\n")


def test_a_key_is_no_group_where_a_command_has_none() -> None:
    config = compose("evaluate", ["out=o", "models=[]", "held_out=h", "teacher=/some/where"])
    assert config.teacher == "/some/where"


def test_a_key_with_the_name_of_a_group_is_a_key() -> None:
    """`student/adapter` is a group with the choice `lora`, and `student.adapter.kind` a key with that value."""
    assert compose("train", [TINY, "student.adapter.kind=lora"]).student.adapter.kind == "lora"


def test_another_policy_of_checkpointing_is_refused() -> None:
    assert (
        "valid are none, block, selective"
        in errors(TINY, "student.gradient_checkpointing=all")["student.gradient_checkpointing"]
    )


@pytest.mark.parametrize(
    ("command", "key", "now"),
    [
        ("train", "evaluation.steps", "evaluation.calls"),
        ("train", "on_policy.steps", "on_policy.calls"),
        ("sample", "steps", "calls"),
        ("evaluate", "steps", "calls"),
    ],
)
def test_an_old_name_of_a_key_says_the_new_one(command: str, key: str, now: str) -> None:
    with pytest.raises(UserError) as raised:
        compose(command, [f"{key}=[1,2]"])
    assert f"{key}: is now called {now}" in str(raised.value).splitlines()


def test_the_model_of_an_export_has_an_alias() -> None:
    assert compose("export", ["checkpoint=runs/a", "out=b"]).model == "runs/a"


def test_one_model_need_not_be_a_list() -> None:
    assert compose("evaluate", ["out=x", "held_out=y", "teacher=z", "models=runs/a"]).models == ("runs/a",)


def test_a_fifo_in_the_config_folder_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    os.mkfifo(tmp_path / "experiment" / "mine.yaml")
    assert config_files(tmp_path) == []
