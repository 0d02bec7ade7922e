"""A whole evaluation by VBench: the files that it finds, what is kept at a second start, and the table.

VBench and its networks cannot be installed here, so a small script plays its part as another program: it takes VBench's
command line, finds the videos as VBench 0.1.5 does, and writes a result in VBench's format, with made-up scores.
"""

import fcntl
import json
import stat
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anyflow_train.__main__ import main
from anyflow_train.commands import sample
from anyflow_train.config.commands import SampleConfig
from anyflow_train.errors import UserError, UserErrors
from anyflow_vbench import command
from anyflow_vbench.config import VBenchConfig
from anyflow_vbench.table import Column
from tests.export.runs import CHUNKS, FULL, make_run

RED, BLUE = "a red ball, moving left", "a blue square"
INFO = [
    {"prompt_en": RED, "dimension": ["temporal_flickering", "color"]},
    {"prompt_en": BLUE, "dimension": ["temporal_flickering"]},
]
STAND_IN = """#!{python}
import argparse, json, os, sys
from pathlib import Path

here = Path(__file__).parent
if sys.argv[1] == "-c":
    print("a library says something")
    print(json.dumps({{"info": str(here / "info.json"), "gpus": 1}}))
    sys.exit()
with open(here / "called.txt", "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
parser = argparse.ArgumentParser()
for name in ("videos_path", "output_path", "full_json_dir", "mode", "prompt_file", "dimension"):
    parser.add_argument(f"--{{name}}")
args = parser.parse_args(sys.argv[sys.argv.index("vbench.launch.evaluate") + 1 :])
if (here / "broken").exists():
    raise ModuleNotFoundError("No module named 'detectron2'")
there = os.listdir(args.videos_path)
if args.mode == "custom_input":
    prompts = json.load(open(args.prompt_file))
    assert set(there) <= set(prompts)
    names = there
else:
    wanted = [entry for entry in json.load(open(args.full_json_dir)) if args.dimension in entry["dimension"]]
    names = [f"{{entry['prompt_en']}}-{{index}}.mp4" for entry in wanted for index in range(5)]
videos = [{{"video_path": f"{{args.videos_path}}/{{name}}", "video_results": 0.5}} for name in names if name in there]
with open(os.path.join(args.output_path, "results_2026-11-23-04:41:43_eval_results.json"), "w") as file:
    json.dump({{args.dimension: [len(videos) / 16, videos]}}, file, indent=4)
"""

Run = Callable[..., list[Column]]
PROJECT = Path(__file__).resolve().parents[3] / "integrations" / "vbench" / "pyproject.toml"


def install(folder: Path, commands: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    """What pip leaves of a package's entry points, on the path."""
    info = folder / "anyflow_vbench-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: anyflow_vbench\nVersion: 0\n")
    lines = [f"{name} = {target}" for name, target in commands.items()]
    (info / "entry_points.txt").write_text("\n".join(["[anyflow_train.commands]", *lines]) + "\n")
    patch.syspath_prepend(folder)


@pytest.fixture
def installed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, with the entry points of its own project file."""
    points = tomllib.loads(PROJECT.read_text())["project"]["entry-points"]["anyflow_train.commands"]
    install(tmp_path_factory.mktemp("site"), points, monkeypatch)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run, VBench's list of two prompts, and the stand-in for its interpreter."""
    make_run(tmp_path, FULL)
    (tmp_path / "info.json").write_text(json.dumps(INFO))
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return tmp_path


@pytest.fixture
def run(root: Path) -> Run:
    """Evaluate the run at one and two calls."""

    def evaluated(vbench: dict[str, Any], **options: Any) -> list[Column]:
        settings = {
            "models": (str(root / "run"),),
            "calls": (1, 2),
            "text_length": 16,
            "device": "cpu",
            "precision": "fp32",
        }
        chosen = {"dimensions": ("temporal_flickering", "color"), "videos": 2, "python": str(root / "python"), **vbench}
        config = VBenchConfig(out=str(root / "out"), **{**settings, **chosen, **options})
        return command.run(config)

    return evaluated


def written(root: Path) -> dict[str, bytes]:
    folder = root / "out" / "run"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/videos/*")}


def sampled(root: Path, model: Path, video: dict[str, Any], steps: int) -> bytes:
    """What `anyflow sample` makes of a video's text and seed."""
    made = {"prompts": (video["prompt"],), "seeds": (video["seed"],), "calls": (steps,), "text_length": 16}
    config = SampleConfig(model=str(model), out=str(root / "again"), **made, device="cpu", precision="fp32")
    sample.run(config)
    (made,) = json.loads((root / "again" / "index.json").read_text())["videos"]
    return (root / "again" / made["file"]).read_bytes()


def calls(root: Path) -> list[str]:
    return (root / "called.txt").read_text().splitlines()


def test_videos_lie_where_vbench_looks_and_their_scores_become_one_table(
    root: Path, run: Run, capsys: pytest.CaptureFixture[str]
):
    columns = run({})
    names = {f"{prompt}-{index}.mp4" for prompt in (RED, BLUE) for index in (0, 1)}
    assert set(written(root)) == {f"{steps}/videos/{name}" for steps in (1, 2) for name in names}
    assert [(column.model, column.calls) for column in columns] == [("run", 1), ("run", 2)]
    flickering = columns[0].results["temporal_flickering"]
    assert (flickering.score, flickering.files) == (4 / 16, names)
    assert "| color               | 0.1250      | 0.1250       |" in capsys.readouterr().out
    report = json.loads((root / "out" / "vbench.json").read_text())["columns"]
    assert report[1]["scores"]["color"] == {"score": 0.125, "videos": 2}
    assert report[1]["overall"] == {}
    assert (root / "out" / "vbench.md").read_text().startswith("| dimension           | run, 1 call | run, 2 calls |")


def test_a_video_is_what_sample_makes_of_its_noted_text_and_seed(root: Path, run: Run):
    texts = root / "texts.txt"
    texts.write_text("a longer text about red\na longer text about blue\n")
    run({"score": False, "texts": str(texts), "info": str(root / "info.json")}, calls=(2,))
    made = json.loads((root / "out" / "run" / "2" / "videos.json").read_text())
    video = made["videos"][f"{BLUE}-1.mp4"]
    assert video["prompt"] == "a longer text about blue"
    assert sampled(root, root / "run", video, 2) == written(root)[f"2/videos/{BLUE}-1.mp4"]
    assert made["settings"]["step"] == 7


def test_a_second_start_makes_only_what_is_missing(root: Path, run: Run):
    run({})
    before, scored = written(root), len(calls(root))
    videos = root / "out" / "run" / "1" / "videos"
    lost, kept = videos / f"{RED}-1.mp4", videos / f"{RED}-0.mp4"
    lost.unlink()
    (videos / f".tmp-{RED}-4.mp4").write_bytes(b"half of a video, as a killed run leaves it")
    stamp = kept.stat().st_mtime_ns
    run({})
    assert written(root) == before
    assert kept.stat().st_mtime_ns == stamp
    assert len(calls(root)) == scored == 4
    # Three videos for each prompt are others than those that were scored.
    run({"videos": 3})
    assert len(written(root)) == 12
    assert len(calls(root)) == 8


def test_without_scoring_the_commands_are_printed_and_fill_the_table_later(
    root: Path, run: Run, capsys: pytest.CaptureFixture[str]
):
    options = {"score": False, "info": str(root / "info.json"), "dimensions": ("color",)}
    columns = run(options, calls=(1,))
    assert columns[0].results == {}
    assert set(written(root)) == {f"1/videos/{RED}-{index}.mp4" for index in (0, 1)}  # color is of one prompt
    assert not (root / "called.txt").exists()
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith(f"{root}/python -m torch.distributed.run ")
    assert f"--videos_path {root}/out/run/1/videos --dimension color" in printed
    folder = root / "out" / "run" / "1" / "scores" / "color"
    folder.mkdir(parents=True)
    result = {"color": [0.75, [{"video_path": f"/elsewhere/{RED}-{index}.mp4"} for index in (0, 1)]]}
    (folder / "results_now_eval_results.json").write_text(json.dumps(result))
    assert run(options, calls=(1,))[0].results["color"].score == 0.75


def test_own_prompts_go_with_a_list_of_what_each_video_shows(root: Path, run: Run):
    prompts = root / "prompts.txt"
    prompts.write_text("a cat/dog\n")
    columns = run({"prompts": str(prompts), "dimensions": ("overall_consistency",)}, calls=(1,))
    assert columns[0].results["overall_consistency"].files == {"000_a-cat-dog-0.mp4", "000_a-cat-dog-1.mp4"}
    (listed,) = calls(root)
    assert listed.endswith(f"--mode custom_input --prompt_file {root}/out/run/1/prompts.json")
    # VBench would score every video of the folder, so it must hold no others.
    prompts.write_text("a bird\n")
    with pytest.raises(UserError, match=r"out: .*videos contains a different video, 000_a-cat-dog-0\.mp4"):
        run({"prompts": str(prompts), "dimensions": ("overall_consistency",)}, calls=(1,))


def test_what_failed_is_named_and_the_rest_is_kept(root: Path, run: Run):
    run({"dimensions": ("temporal_flickering",)}, calls=(1,))
    (root / "broken").touch()
    with pytest.raises(UserErrors, match=r"VBench failed for color: ModuleNotFoundError: No module named 'detectron2'"):
        run({}, calls=(1,))
    assert "| temporal_flickering | 0.2500      |" in (root / "out" / "vbench.md").read_text()


def test_a_causal_student_makes_its_clips_chunk_by_chunk(root: Path, run: Run):
    causal = root / "causal"
    causal.mkdir()
    make_run(causal, FULL, causal=CHUNKS)
    run({"dimensions": ("color",), "videos": 1}, models=(str(causal / "run"),), calls=(1,))
    made = json.loads((root / "out" / "run" / "1" / "videos.json").read_text())
    assert (made["settings"]["chunk_partition"], made["settings"]["frames"]) == ([1, 1, 1], 9)
    name = f"{RED}-0.mp4"
    assert sampled(root, causal / "run", made["videos"][name], 1) == written(root)[f"1/videos/{name}"]
    with pytest.raises(UserError, match=r"chunk_partition: \[1, 1, 1\] sums to 3, but frames=5 gives 2"):
        run({"frames": 5}, models=(str(causal / "run"),))


def test_mistakes_are_told_before_anything_is_made(root: Path, run: Run):
    mistakes: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"gpus": 2}, {}, r"gpus: 2, but torch of .* finds 1, and VBench scores only on GPUs"),
        ({"info": str(root / "absent.json")}, {}, r"info: .* cannot be read"),
        ({"height": 40}, {}, r"height: 40 pixels are not a multiple of 16"),
        ({}, {"models": (str(root / "absent"),)}, "absent"),
    ]
    for vbench, options, message in mistakes:
        with pytest.raises(UserError, match=message):
            run(vbench, **options)
    assert not (root / "out").exists()
    assert not (root / "called.txt").exists()


def test_videos_that_were_made_otherwise_are_not_mixed_in(root: Path, run: Run):
    run({"videos": 1, "dimensions": ("color",)}, calls=(1,))
    before = written(root)
    with pytest.raises(UserError, match=r"out: .*/run/1 contains videos with shift=5\.0, not 3\.0; give another out"):
        run({}, shift=3.0)
    with pytest.raises(UserError, match=r"contains videos with weights='ema', not 'raw'"):
        run({}, weights="raw")
    with pytest.raises(UserError, match=r"contains .*-0\.mp4 with another text or seed"):
        run({}, seed=1)
    make_run(root / "later", FULL, gate=0.5)
    with pytest.raises(UserError, match=r"contains videos with weights_digest="):
        run({}, models=(str(root / "later" / "run"),))
    with open(root / "out" / "run" / "1" / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another `anyflow vbench` is writing"):
            run({})
    assert written(root) == before


def test_the_core_works_without_the_package(capsys: pytest.CaptureFixture[str]):
    assert main(["vbench"]) == 2
    assert "vbench: is not a command" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "vbench" not in capsys.readouterr().out


@pytest.mark.usefixtures("installed")
def test_the_installed_package_adds_its_command_and_its_help(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    assert "  vbench      score videos of models with VBench" in capsys.readouterr().out
    assert main(["vbench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "dimensions: list of" in shown
    assert "models: list of str (required)" in shown


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.MonkeyPatch.context() as patch:
        install(tmp_path, {"broken": "no_such_package:COMMAND"}, patch)
        assert main(["broken"]) == 2
    assert "broken: cannot be loaded from no_such_package:COMMAND" in capsys.readouterr().err


@pytest.mark.usefixtures("installed")
def test_the_command_line_takes_its_keys(root: Path, capfd: pytest.CaptureFixture[str]):
    arguments = [f"models=[{root}/run]", f"out={root}/out", "device=cpu"]
    assert main(["vbench", *arguments, "dimensions=[colour]"]) == 2
    assert "nearest is 'color'" in capfd.readouterr().err
    assert main(["vbench", *arguments]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: python: {sys.executable} cannot import VBench (ModuleNotFoundError")
    assert not (root / "out").exists()
