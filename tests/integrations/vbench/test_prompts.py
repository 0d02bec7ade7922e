"""Which prompts are taken, what they are called, and the seeds of their videos."""

import json
from pathlib import Path
from typing import Any

import pytest

from anyflow_train.errors import UserError
from anyflow_vbench.config import DIMENSIONS, OF_THE_SUITE, VBenchConfig
from anyflow_vbench.prompts import Prompt, read_prompts


def options(**keys: Any) -> VBenchConfig:
    """A config with some keys of its own."""
    return VBenchConfig(out="out", models=("model",), **keys)


# As in VBench's list: a prompt may stand in it twice, and auxiliary_info tells a detector what to look for.
INFO = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {
        "prompt_en": "a bird and a cat",
        "dimension": ["multiple_objects"],
        "auxiliary_info": {"multiple_objects": {"object": "bird and cat"}},
    },
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_style"]},
]


@pytest.fixture
def info(tmp_path: Path) -> Path:
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(INFO))
    return path


def test_prompts_are_those_of_the_dimensions_each_once(info: Path):
    everything = read_prompts(options(), info)
    assert [prompt.name for prompt in everything] == ["In a still frame, a stop sign", "a bird and a cat"]
    assert everything[0].dimensions == {"temporal_flickering", "temporal_style"}
    assert everything[0].file(3) == "In a still frame, a stop sign-3.mp4"
    assert [prompt.name for prompt in read_prompts(options(dimensions=("multiple_objects",)), info)] == [
        "a bird and a cat"
    ]


def test_a_model_is_given_other_texts_under_the_same_names(info: Path, tmp_path: Path):
    texts = tmp_path / "texts.txt"
    texts.write_text("A red stop sign, long\nA small bird, long\nanother stop sign\n")
    found = read_prompts(options(texts=str(texts)), info)
    assert [(prompt.name, prompt.text) for prompt in found] == [
        ("In a still frame, a stop sign", "A red stop sign, long"),
        ("a bird and a cat", "A small bird, long"),
    ]
    texts.write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"texts: .* has 2 lines, but .* has 3 prompts"):
        read_prompts(options(texts=str(texts)), info)


def test_own_prompts_may_be_what_no_file_name_can_hold(tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    long = "a cat/dog " + "runs and " * 60
    prompts.write_text(f"a cat\n\n{long}\na cat\n")
    found = read_prompts(options(prompts=str(prompts)), None)
    assert [prompt.prompt for prompt in found] == ["a cat", long.strip()]
    assert [prompt.file(0) for prompt in found] == [
        "000_a-cat-0.mp4",
        "001_a-cat-dog-runs-and-runs-and-runs-and-run-0.mp4",
    ]
    assert found[0].dimensions == set(DIMENSIONS) - OF_THE_SUITE


def test_every_video_has_a_seed_of_its_own_that_nothing_else_changes():
    prompts = [Prompt(name, name, text, frozenset()) for name in ("a", "b") for text in ("short", "long")]
    seeds = {(prompt.name, index): prompt.seed(0, index) for prompt in prompts for index in range(5)}
    assert len(set(seeds.values())) == len(seeds) == 10
    assert prompts[0].seed(0, 4) == prompts[1].seed(0, 4) != prompts[0].seed(1, 4)
    assert all(0 <= seed < 2**32 for seed in seeds.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not VBench's"),
        ('{"prompt_en": "a"}', "is not VBench's"),
        ('[{"prompt": "a", "dimension": []}]', "is not VBench's .*prompt_en"),
        ('[{"prompt_en": "a/b", "dimension": ["color"]}]', "'a/b' cannot be the name of a file"),
    ],
)
def test_another_list_is_refused(tmp_path: Path, content: str, message: str):
    (tmp_path / "info.json").write_text(content)
    with pytest.raises(UserError, match=rf"info: .*{message}"):
        read_prompts(options(), tmp_path / "info.json")


def test_missing_and_empty_files_are_named(tmp_path: Path, info: Path):
    with pytest.raises(UserError, match=r"info: .*absent\.json' cannot be read: No such file"):
        read_prompts(options(), tmp_path / "absent.json")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"prompts: .*empty\.txt' has no prompts"):
        read_prompts(options(prompts=str(tmp_path / "empty.txt")), None)
    with pytest.raises(UserError, match=r"dimensions: color: no prompt of .* is for these"):
        read_prompts(options(dimensions=("color",)), info)
