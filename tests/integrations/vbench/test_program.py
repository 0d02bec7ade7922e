"""How VBench is called, what is read of its results, its overall scores, and what is said where it is missing."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from anyflow_train.errors import UserError
from anyflow_vbench.config import DIMENSIONS, VBenchConfig
from anyflow_vbench.program import VBench, find_vbench, overall, read_result, score

# VideoCrafter-2.0 on VBench's leaderboard, in percent: the dimensions in the order of DIMENSIONS.
PUBLISHED = (
    96.85, 98.22, 98.41, 97.73, 42.50, 63.13, 67.22,
    92.55, 40.66, 95.00, 92.92, 35.86, 55.29, 25.13, 25.84, 28.23,
)  # fmt: skip
PUBLISHED_OVERALL = {"quality": 82.20, "semantic": 73.42, "total": 80.44}


def options(**keys: Any) -> VBenchConfig:
    """A config with some keys of its own."""
    return VBenchConfig(out="out", models=("model",), **keys)


def test_the_overall_scores_are_those_of_the_leaderboard():
    scores = {name: value / 100 for name, value in zip(DIMENSIONS, PUBLISHED, strict=True)}
    # All published figures are rounded to 0.005 percent; a narrow range makes up to 4 times that of one of them.
    assert overall(scores) == {name: pytest.approx(value / 100, abs=1e-4) for name, value in PUBLISHED_OVERALL.items()}


def test_an_overall_score_needs_all_of_its_dimensions():
    scores = {name: value / 100 for name, value in zip(DIMENSIONS, PUBLISHED, strict=True)}
    assert set(overall({name: scores[name] for name in DIMENSIONS[:7]})) == {"quality"}
    assert set(overall({name: scores[name] for name in DIMENSIONS[7:]})) == {"semantic"}
    assert overall({name: scores[name] for name in DIMENSIONS[1:8]}) == {}


def test_the_command_is_that_of_vbenchs_own_launcher():
    folder = Path("/o/run/4")
    suite = VBench("env/bin/python", Path("/v/VBench_full_info.json"), 2)
    own = VBench("env/bin/python", None, 1)
    asked = (folder / "videos", folder / "prompts.json", "color", folder / "scores" / "color")
    begin = "env/bin/python -m torch.distributed.run --standalone --nproc_per_node {} -m vbench.launch.evaluate"
    middle = " --videos_path /o/run/4/videos --dimension color --output_path /o/run/4/scores/color"
    assert suite.command(*asked) == f"{begin.format(2)}{middle} --full_json_dir /v/VBench_full_info.json".split()
    assert own.command(*asked) == (
        f"{begin.format(1)}{middle} --mode custom_input --prompt_file /o/run/4/prompts.json".split()
    )


def write_result(folder: Path, stamp: str, content: object) -> None:
    (folder / f"results_{stamp}_eval_results.json").write_text(json.dumps(content))


def test_the_last_result_counts(tmp_path: Path):
    """The format is VBench 0.1.5's own: so it wrote it for videos of `assets/tiny-wan`, here with fewer digits."""
    assert read_result(tmp_path, "temporal_flickering") is None
    write_result(tmp_path, "2026-11-22-23:59:59", {"temporal_flickering": [0.1, []]})
    videos = [
        {"video_path": "/o/run/4/videos/a red ball-0.mp4", "video_results": 0.949},
        {"video_path": "/o/run/4/videos/a red ball-1.mp4", "video_results": 0.957},
    ]
    write_result(tmp_path, "2026-11-23-04:41:43", {"temporal_flickering": [0.953, videos]})
    (tmp_path / "results_2026-11-23-04:41:43_full_info.json").write_text("[]")
    result = read_result(tmp_path, "temporal_flickering")
    assert result is not None
    assert (result.score, result.files) == (0.953, {"a red ball-0.mp4", "a red ball-1.mp4"})


def test_a_mean_over_nothing_is_no_score(tmp_path: Path):
    write_result(tmp_path, "now", {"color": [float("nan"), []]})
    assert read_result(tmp_path, "color") is None


@pytest.mark.parametrize("content", [{"scene": [1.0, []]}, {"color": 1.0}, {"color": ["much", []]}, []])
def test_another_format_is_named(tmp_path: Path, content: object):
    write_result(tmp_path, "now", content)
    with pytest.raises(UserError, match=r"results_now_eval_results\.json: is not a result of VBench for color"):
        read_result(tmp_path, "color")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise ModuleNotFoundError('no detectron2')", r"ModuleNotFoundError: no detectron2"),
        (
            "print('[rank0]: a.b.CalledProcessError: wget\\nx.ChildFailedError: \\n====='); exit(1)",
            r"a\.b\.CalledProcessError: wget",
        ),
        ("exit(3)", "exit code 3"),
        ("pass", "no score"),
    ],
)
def test_a_failure_says_why(tmp_path: Path, program: str, reason: str):
    with pytest.raises(UserError, match=rf"VBench failed for color: {reason}; see .*vbench\.log"):
        score([sys.executable, "-c", program], "color", tmp_path / "color")


def test_where_vbench_is_missing_the_message_says_how_to_install_it():
    """Of the interpreter that runs the tests, for which VBench cannot be installed: it pins older packages."""
    with pytest.raises(UserError) as caught:
        find_vbench(options())
    assert caught.value.where == "python"
    for words in (sys.executable, "No module named 'vbench'", "pip install vbench", "python=", "score="):
        assert words in caught.value.problem
    with pytest.raises(UserError, match=r"python: '/no/python' cannot be started: No such file"):
        find_vbench(options(python="/no/python"))


def test_videos_alone_need_no_vbench_but_its_list_of_prompts(tmp_path: Path):
    info = tmp_path / "info.json"
    assert find_vbench(options(score=False, info=str(info))).info == info
    assert find_vbench(options(score=False, prompts="mine.txt")).info is None
    with pytest.raises(UserError, match="cannot import VBench"):
        find_vbench(options(score=False))
