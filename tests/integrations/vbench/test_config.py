"""Each rule names the key that fixes it; nothing else is reported beside."""

from typing import Any

import pytest

from anyflow_train.config.decode import decode
from anyflow_vbench.config import VBenchConfig, rules

BASE: dict[str, Any] = {"out": "x", "models": ["m"]}


def found(values: dict[str, Any]) -> dict[str, str]:
    _, errors = decode(VBenchConfig, BASE | values, rules, {}, dict)
    return {error.where: error.problem for error in errors}


@pytest.mark.parametrize(
    ("values", "key", "words"),
    [
        ({"models": []}, "models", "at least one model"),
        ({"dimensions": []}, "dimensions", "score=false to write videos"),
        ({"dimensions": ["scenes"]}, "dimensions.0", "nearest is 'scene'"),
        ({"frames": 80}, "frames", "77 and 81"),
        ({"width": 100}, "width", "96 and 112"),
        ({"prompts": "p", "info": "i"}, "info", "requires VBench's own prompts"),
        ({"prompts": "p", "texts": "t"}, "texts", "requires VBench's own prompts"),
        ({"prompts": "p", "dimensions": ["color", "human_action"]}, "dimensions", "color, human_action can be scored"),
        ({"videos": 6}, "videos", "less than or equal to 5"),
    ],
)
def test_a_mistake_names_its_key(values: dict[str, Any], key: str, words: str) -> None:
    errors = found(values)
    assert list(errors) == [key]
    assert words in errors[key]


def test_guided_models_and_own_prompts_are_taken() -> None:
    assert found({"guidance_scale": 5.0, "prompts": "p"}) == {}
