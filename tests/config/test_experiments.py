"""Every shipped experiment composes, passes its rules, and holds the published hyper-parameters where it says so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from omegaconf import OmegaConf

from anyflow_train.__main__ import main
from anyflow_train.config.base import Model
from anyflow_train.config.compose import MODELS, compose, config_folders
from anyflow_train.config.derived import shares_base, table
from anyflow_train.config.groups import EXPERIMENT, find_groups
from anyflow_train.config.keys import chosen, variants
from anyflow_train.config.network import LORA_TARGETS, Lora
from anyflow_train.config.objective import FlowMatching
from anyflow_train.config.objectives import FlowMap
from anyflow_train.config.rules.run import run_warnings
from anyflow_train.config.run import RunConfig
from anyflow_train.config.stages import typed_choices
from anyflow_train.errors import UserErrors

GROUPS = find_groups(config_folders(None))
EXPERIMENTS = GROUPS[EXPERIMENT]
RUNS = [name for name, choice in EXPERIMENTS.items() if choice.command == "train"]
# What a person has to give beside the experiment, by command.
NEEDED = {
    "distil": ["source=clips"],
    "prepare": ["source=clips", "out=shards"],
    "evaluate": ["models=[runs/a]", "held_out=shards", "out=report"],
}


@cache
def composed(name: str) -> Any:
    """The config of an experiment. Most tests look at the same ones, and each takes Hydra a quarter of a second."""
    command = EXPERIMENTS[name].command
    assert command is not None
    return compose(command, [f"experiment={name}", *NEEDED.get(command, [])])


def test_every_experiment_says_its_command() -> None:
    assert {choice.command for choice in EXPERIMENTS.values()} <= set(MODELS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_composes(name: str) -> None:
    command = EXPERIMENTS[name].command
    assert command is not None
    config = composed(name)
    assert isinstance(config, MODELS[command])
    # What is saved in a run directory is read back as it was.
    assert type(config).model_validate_json(config.model_dump_json(), strict=True) == config


@pytest.mark.parametrize("name", RUNS)
def test_runs_derive(name: str) -> None:
    config: RunConfig = composed(name)
    assert config.name == name
    size, accumulation, micro_batch = re.findall(r"(\d+) (?:=|acc|mic)", dict(table(config, 1))["global batch"])
    assert int(size) == int(accumulation) * int(micro_batch) == config.engine.global_batch
    unexpected = [finding for finding in run_warnings(config, 1) if finding.keys[0] != "evaluation.held_out"]
    assert unexpected == []


@pytest.mark.parametrize(
    ("size", "steps", "batch", "micro", "heads", "layers", "ffn"),
    [("1_3b", 6000, 32, 2, 12, 30, 8960), ("14b", 4000, 16, 1, 40, 40, 13824)],
)
@pytest.mark.parametrize("stage", ["teacher", "forward", "forward_reference"])
def test_published_hyperparameters(
    size: str, stage: str, steps: int, batch: int, micro: int, heads: int, layers: int, ffn: int
) -> None:
    config: RunConfig = composed(f"wan{size}_{stage}")
    shape, optimizer = config.student.architecture, config.optimizer
    assert (shape.num_attention_heads, shape.attention_head_dim, shape.num_layers, shape.ffn_dim) == (
        (heads, 128, layers, ffn)
    )
    assert (shape.text_dim, shape.freq_dim) == (4096, 256)
    assert (config.steps, config.engine.global_batch, config.engine.micro_batch) == (steps, batch, micro)
    assert (config.data.frames, config.data.height, config.data.width) == (81, 480, 832)
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (5e-5, (0.9, 0.95), 0.0)
    assert (optimizer.warmup_steps, optimizer.schedule, optimizer.clip_norm) == (1000, "constant", 1.0)
    assert (optimizer.ema.decay, optimizer.ema.start_step) == (0.999, 1000)
    adapter = config.student.adapter
    assert isinstance(adapter, Lora)
    assert (adapter.rank, adapter.alpha) == (256, 256.0)
    embedders = [target for target in adapter.targets if target not in LORA_TARGETS]
    assert set(adapter.targets) >= set(LORA_TARGETS)
    assert len(embedders) == (0 if stage == "teacher" else 4)


@pytest.mark.parametrize("name", ["wan1_3b_teacher", "wan14b_teacher", "tiny_teacher"])
def test_teachers_are_plain_flow_matching_without_a_second_time(name: str) -> None:
    config: RunConfig = composed(name)
    assert isinstance(config.objective, FlowMatching)
    assert config.student.gate_value == 0


@pytest.mark.parametrize("name", [name for name in RUNS if name.endswith("_reference")])
def test_references_are_as_published(name: str) -> None:
    config: RunConfig = composed(name)
    assert config.objective == FlowMap(
        kind="flow_map",
        guidance="prediction",
        guidance_scale=3.0,
        text_dropout=0.1,
        velocity="data",
        derivative_network="student",
        derivative_precision="bf16",
        derivative_ends="free",
        epsilon=0.005,
        weight="beta08",
        rebalance="weighted",
        rebalance_floor=0.0,
    )
    assert config.times.precision == "bf16"
    assert (config.times.shift, config.times.diffusion_share, config.times.consistency_share) == (5.0, 0.5, 0.25)
    assert (config.student.gate_value, config.student.deltatime_type) == (0.25, "r")
    assert config.engine.precision == "bf16"


@pytest.mark.parametrize("name", [name for name in RUNS if name.endswith("_reference")])
def test_reference_twins_differ_only_where_the_published_recipe_does(name: str) -> None:
    reference: RunConfig = composed(name)
    ours: RunConfig = composed(name.removesuffix("_reference"))
    differing = {key for key, value in reference.model_dump().items() if value != ours.model_dump()[key]}
    assert differing <= {"name", "student", "objective", "times", "on_policy", "engine"}


def test_every_choice_of_every_group_is_valid() -> None:
    """A choice that no experiment uses would otherwise rot: the i-th choices of all free groups together."""
    not_free = {EXPERIMENT, "objective", "times", "teacher", "model", "stage", "recipe"}
    free = {group: list(GROUPS[group]) for group in sorted(set(GROUPS) - not_free)}
    for turn in range(max(map(len, free.values()))):
        chosen = {group: names[turn % len(names)] for group, names in free.items()}
        if "causal" in chosen["student"]:  # its chunks are those of certain clips
            chosen["data"] = "tiny" if chosen["student"].startswith("tiny") else "wan_480p"
        elif "causal" in chosen["student/adapter"]:
            chosen["student"], chosen["data"] = "tiny_causal", "tiny"
        chosen["objective.velocity"] = "data"  # which every student can have
        if chosen["on_policy"].endswith("two_sizes"):
            chosen["on_policy.fake_score.init"] = "network"
        if chosen["student"].startswith("wan"):
            chosen["student.init"] = "network"  # not the tiny teacher
        config = compose("train", ["experiment=tiny", *(f"{group}={name}" for group, name in chosen.items())])
        assert config.name == "tiny"


def test_every_file_explains_itself() -> None:
    folder = config_folders(None)[0]
    for path in folder.rglob("*.yaml"):
        if path.parent != folder:
            assert re.match(r"# \S", path.read_text(encoding="utf-8")), path


STAGES = ("teacher", "forward", "on_policy", "causal", "causal_on_policy")


@pytest.mark.parametrize("recipe", ["default", "reference"])
@pytest.mark.parametrize("model", ["wan1_3b", "wan14b"])
def test_stage_model_and_recipe_name_an_experiment(model: str, recipe: str) -> None:
    for stage in STAGES[1:] if recipe == "reference" else STAGES:
        name = f"{model}_{stage}" + ("" if recipe == "default" else "_reference")
        found = compose("train", [f"experiment={stage}", f"model={model}", f"recipe={recipe}"])
        assert found == composed(name)
    assert compose("train", ["experiment=forward", "steps=7"]).name == "wan1_3b_forward"


def test_tiny_has_the_names_of_its_stages_too() -> None:
    for stage, name in (
        ("forward", "tiny"),
        ("on_policy", "tiny_on_policy"),
        ("causal_teacher", "tiny_causal_teacher"),
    ):
        found = compose("train", [f"experiment={stage}", "model=tiny"])
        assert found.model_copy(update={"name": name}) == composed(name)


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (
            ["experiment=teacher", "model=tiny", "recipe=reference"],
            "experiment",
            "there are model=tiny, model=wan14b",
        ),
        (["experiment=forward", "model=tinny"], "experiment", "no experiment with model=tinny"),
        (["experiment=tiny", "model=wan14b"], "model", "experiment=tiny is not a stage"),
        (["recipe=reference", "steps=1", "name=a"], "recipe", "no experiment is given"),
    ],
)
def test_a_stage_that_cannot_be_is_one_error(overrides: list[str], key: str, words: str) -> None:
    with pytest.raises(UserErrors) as caught:
        compose("train", overrides)
    assert [error.where for error in caught.value.errors] == [key]
    assert words in str(caught.value)


def test_a_14b_teacher_has_a_student_of_1_3b() -> None:
    for stage in ("forward", "on_policy"):
        config: RunConfig = compose("train", [f"experiment={stage}", "model=wan14b_to_wan1_3b"])
        assert config.teacher.source == "Wan-AI/Wan2.1-T2V-14B-Diffusers"
        assert config.student.architecture.num_layers == 30
        assert not shares_base(config)


def test_a_published_network_of_another_shape_is_no_start() -> None:
    with pytest.raises(UserErrors) as caught:
        compose("train", ["experiment=wan1_3b_forward", "teacher=wan14b"])
    (error,) = caught.value.errors
    assert error.where == "student.init"
    assert "(the teacher) has num_layers=40" in error.problem
    assert "give student.init=Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in error.problem
    local = ["experiment=wan1_3b_forward", "teacher.source=/models/Wan2.1-T2V-14B-Diffusers"]
    with pytest.raises(UserErrors, match=r"student\.init"):
        compose("train", local)
    compose("train", ["experiment=wan1_3b_forward", "teacher=wan14b", "student.init=Wan-AI/Wan2.1-T2V-1.3B-Diffusers"])
    lora = ["experiment=on_policy", "model=wan14b_to_wan1_3b", "on_policy.fake_score.adapter.kind=lora"]
    with pytest.raises(UserErrors, match=r"on_policy\.fake_score\.adapter: lora requires one base"):
        compose("train", [*lora, "on_policy.fake_score.init=${teacher.source}"])


def test_a_group_file_holds_only_what_differs_from_the_defaults() -> None:
    """A default that stands twice is changed in one place only, sooner or later."""
    repeated = []
    for group in ("objective", "times", "on_policy", "optimizer", "data", "engine", "evaluation", "tracker", "student"):
        for path in sorted((config_folders(None)[0] / group).rglob("*.yaml")):
            values = OmegaConf.to_container(OmegaConf.load(path)) or {}
            parts = path.parent.relative_to(config_folders(None)[0]).parts
            model: type[Model] = RunConfig
            assert isinstance(values, dict)
            for part in parts:
                kinds = variants(model.model_fields[part].annotation)
                model = chosen(kinds, values if part == parts[-1] else {})[0]
            repeated += [f"{path.name}: {key}" for key in _repeated(model, values)]
    assert repeated == []


def _repeated(model: type[Model], values: dict[Any, Any], own: Model | None = None) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if name not in values or name == "kind":
            continue
        default = field.get_default(call_default_factory=True) if own is None else getattr(own, name)
        nested, value = variants(field.annotation), values[name]
        if nested and isinstance(value, dict):
            inner = chosen(nested, value)[0]
            yield from _repeated(inner, value, default if isinstance(default, inner) else None)
        elif value == (list(default) if isinstance(default, tuple) else default):
            yield name


@pytest.mark.parametrize("experiment", ["tiny_on_policy", "tiny_teacher", "wan1_3b_teacher"])
def test_validation_is_switched_off_by_its_group(experiment: str) -> None:
    off: RunConfig = compose("train", [f"experiment={experiment}", "evaluation=none"])
    assert (off.evaluation.every, off.evaluation.videos) == (0, 0)
    on: RunConfig = compose("train", [f"experiment={experiment}", "evaluation.every=7", "evaluation=none"])
    assert on.evaluation.every == 7
    last: RunConfig = compose("train", [f"experiment={experiment}", "evaluation=none", "evaluation=wan"])
    assert last.evaluation.every > 0  # as with any group, the last choice counts


def test_help_and_completion_offer_recipes_that_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(typed_choices("recipe", GROUPS)) == ["default", "reference"]
    assert main(["completion", "words", "train", "recipe="]) == 0
    assert capsys.readouterr().out.split() == ["recipe=default", "recipe=reference"]
    assert main(["train", "--help"]) == 0
    assert "recipe=...            default, reference\n" in capsys.readouterr().out
