"""`anyflow distil`: its parts in order, what is repeated and what is not, and what it says before it starts."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from anyflow_train.__main__ import main
from anyflow_train.config.paths import resource
from anyflow_train.distil import command
from anyflow_train.sweep.command import check_evaluation
from tests.evaluation.test_evaluate import write_held_out


class Commands:
    """Stand-in for the commands that `distil` starts: each makes its result."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.fails: dict[str, int] = {}

    def __call__(self, _runner: object, arguments: Sequence[str], _logged: object = None) -> tuple[int, float]:
        self.calls.append(list(arguments))
        given = {key: value.strip("'") for key, _, value in (part.partition("=") for part in arguments[1:])}
        name = given.get("name", arguments[0])
        if name in self.fails:
            return self.fails.pop(name), 0.0
        out = Path(given["out"])
        if "name" in given:
            out = out / given["name"]
        out.mkdir(parents=True, exist_ok=True)
        results = {"prepare": "manifest.json", "export": "anyflow_export.json", "evaluate": "report.json"}
        (out / "config.json").write_text('{"steps": 5}')
        mark = {"package": "anyflow_train", "held_out": "others"}  # as in the files of exports and evaluations
        (out / results.get(arguments[0], "done.json")).write_text(json.dumps({"step": 5, **mark}))
        if arguments[0] == "evaluate":
            (out / "report.md").write_text("# report\n\n![Videos](grid.gif)\n\n| calls |\n|---|\n")
        return 0, 0.0

    def names(self) -> list[str]:
        return [next((part for part in call if part.startswith("name=")), call[0]) for call in self.calls]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.chdir(tmp_path)
    for name in ("clips", "others", "a", "a.txt", "p.txt"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(command, "check_evaluation", lambda *_: None)
    found = Commands()
    monkeypatch.setattr(command.Runner, "call", lambda *given: found(*given))
    return found


def line(out: Path, *more: str) -> list[str]:
    return ["distil", "experiment=tiny_distil", "source=clips", "held_out=others", f"out={out}", *more]


def test_the_whole_way_in_order(tmp_path: Path, commands: Commands) -> None:
    assert main(line(tmp_path / "a b")) == 0
    assert commands.names() == ["prepare", "prepare", "name=stage1", "name=stage2", "export", "evaluate"]
    stage2, export, evaluate = commands.calls[3:]
    assert f"student.init='{tmp_path / 'a b' / 'stage1'}'" in stage2
    assert f"evaluation.held_out='{tmp_path / 'a b' / 'held_out'}'" in stage2
    assert f"model='{tmp_path / 'a b' / 'stage2'}'" in export
    assert any("stage1','" in part and "stage2'" in part for part in evaluate)
    page = (tmp_path / "a b" / "summary.md").read_text()
    assert page.count("| finished ") == 6 + 1  # and the column's heading
    assert "![Videos](report/grid.gif)" in page
    assert f"anyflow sample '{tmp_path / 'a b' / 'pipeline'}' prompt" in page


def test_the_same_line_goes_on_where_it_stopped(tmp_path: Path, commands: Commands, capsys) -> None:
    commands.fails = {"stage2": 75}
    assert main(line(tmp_path)) == 75
    assert "stage 2 is not finished; start the same line again" in capsys.readouterr().out
    assert "not finished" in (tmp_path / "summary.md").read_text()
    commands.calls.clear()
    assert main(line(tmp_path)) == 0
    assert commands.names() == ["name=stage2", "export", "evaluate"]
    commands.calls.clear()
    assert main(line(tmp_path)) == 0
    assert commands.names() == []


def test_after_a_mistake_the_same_line_alone_does_not_help(tmp_path: Path, commands: Commands, capsys) -> None:
    commands.fails = {"prepare": 2}
    assert main(line(tmp_path)) == 2
    assert "prepare held-out clips is not finished; mend that, and start the same line again" in capsys.readouterr().out


def test_a_part_is_repeated_if_what_it_was_made_from_is_newer(tmp_path: Path, commands: Commands) -> None:
    assert main(line(tmp_path)) == 0
    commands.calls.clear()
    done = tmp_path / "stage2" / "done.json"
    later = done.stat().st_mtime + 100
    os.utime(done, (later, later))
    assert main(line(tmp_path)) == 0
    assert commands.names() == ["export", "evaluate"]


def test_a_training_that_a_signal_stopped_is_not_finished(tmp_path: Path, commands: Commands) -> None:
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "config.json").write_text(json.dumps({"steps": 10}))
    commands.fails = {"stage1": 0}
    assert main(line(tmp_path)) == 130
    assert commands.names()[-1] == "name=stage1"


def test_several_gpus_are_a_strategy(tmp_path: Path, commands: Commands) -> None:
    assert main(line(tmp_path, "strategy=zero2")) == 0
    assert [call[:2] for call in commands.calls if call[0] == "launch"] == [["launch", "zero2"]] * 2


@pytest.mark.parametrize("model", ["wan1_3b", "wan14b"])
def test_prompts_alone_leave_out_the_evaluation(tmp_path: Path, commands: Commands, model: str) -> None:
    assert main(["distil", f"experiment={model}", "prompts=a.txt", f"out={tmp_path}"]) == 0
    assert commands.names() == ["prepare", "name=stage1", "name=stage2", "export"]
    assert "prompts='a.txt'" in commands.calls[0]
    assert all("objective.source=student" in call for call in commands.calls[1:3])


@pytest.mark.parametrize("model", ["wan1_3b", "wan14b"])
def test_a_guided_student_is_compared_with_the_guided_teacher(tmp_path: Path, commands: Commands, model: str) -> None:
    given = ["distil", f"experiment={model}", "source=clips", "held_out=others", f"out={tmp_path}"]
    assert main(given) == 0
    assert commands.calls[-1][-2:] == ["reference=guided_teacher", "guidance_scale=3.0"]


@pytest.mark.parametrize(
    ("words", "last"),
    [
        ([], "out="),  # not guided
        (["stage2=['experiment=tiny_on_policy','objective.guidance=target','objective.guidance_scale=2']"], "2.0"),
        (["stage2=[]", "stage1=['experiment=tiny','objective.guidance=target','objective.guidance_scale=4']"], "4.0"),
        (
            [
                "stage2=['experiment=tiny_on_policy','objective.guidance=target','objective.guidance_scale=2']",
                "evaluate=['experiment=tiny_evaluate','reference=data']",
            ],
            "out=",
        ),
    ],
)
def test_the_reference_follows_the_last_stage_unless_it_is_chosen(
    tmp_path: Path, commands: Commands, words: list[str], last: str
) -> None:
    assert main(line(tmp_path, *words)) == 0
    assert last in commands.calls[-1][-1]


def test_without_held_out_clips_no_stage_waits_for_those_of_its_experiment(tmp_path: Path, commands: Commands) -> None:
    clips = ["distil", "experiment=tiny_distil", "source=clips"]
    assert main([*clips, f"out={tmp_path / 'a'}"]) == 0
    assert all("evaluation.held_out=null" in call for call in commands.calls[1:3])
    commands.calls.clear()
    own = "['experiment=tiny','evaluation.held_out=mine']"
    assert main([*clips, f"out={tmp_path / 'b'}", f"stage1={own}"]) == 0
    assert "evaluation.held_out=mine" in commands.calls[1]
    assert "evaluation.held_out=null" not in commands.calls[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["experiment=tiny_distil"], "error: source: give either source=CLIPS or prompts=FILE"),
        (["source=a"], "error: stage1: is empty; give experiment=wan1_3b"),
        (
            ["experiment=tiny_distil", "source=a", "stage1=['experiment=tiny','stepz=1']"],
            "error: stage 1: stepz: unknown key",
        ),
        (["experiment=tiny_distil", "source=a", "export=['format=zip']"], "error: export: format: 'zip' is wrong"),
        (
            ["experiment=wan1_3b", "source=a", "strategy=zero9"],
            "error: strategy: 'zero9' is wrong: valid are single",
        ),
        (["experiment=wan1_3b", "source=a", "strategy=zero2"], "error: stage 1: engine.global_batch: 32 is not a"),
    ],
)
def test_mistakes_of_all_parts_are_said_before_the_start(
    commands: Commands, capsys: pytest.CaptureFixture[str], monkeypatch, given: list[str], message: str
) -> None:
    monkeypatch.setenv("NPROC", "7")
    assert main(["distil", *given]) == 2
    assert message in capsys.readouterr().err
    assert not commands.calls


@pytest.mark.parametrize(
    "taken", ["summary.md", "inputs.json", "pipeline/thesis.tex", "report/report.md", "report/report.json"]
)
def test_files_of_the_user_are_never_replaced(tmp_path: Path, commands: Commands, capsys, taken: str) -> None:
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("mine")
    assert main(line(tmp_path)) == 2
    assert capsys.readouterr().err.startswith(f"error: out: '{tmp_path / taken}' exists, and this command did not")
    assert (tmp_path / taken).read_text() == "mine"
    assert not commands.calls


def test_every_experiment_of_distil_is_shipped() -> None:
    found = {
        path.stem
        for path in (resource("configs") / "experiment").glob("*.yaml")
        if "# anyflow distil:" in path.read_text()
    }
    assert found == {"tiny_distil", "wan1_3b", "wan14b"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("stage1=['experiment=tiny','name=mine']", "stage 1: gives name=mine, but distil sets this key itself"),
        ("stage2=['experiment=tiny_on_policy','student.init=a']", "stage 2: gives student.init=a, but distil sets"),
        ("export=['overwrite=false']", "export: gives overwrite=false, but distil sets this key itself"),
        # An evaluation that is left out would drop it without a word.
        ("evaluate=['held_out=shards']", "evaluate: gives held_out=shards, but distil sets this key itself"),
    ],
)
def test_keys_that_distil_sets_itself_are_refused(
    tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str], given: str, message: str
) -> None:
    assert main(["distil", "experiment=tiny_distil", "source=clips", f"out={tmp_path / 'a'}", given]) == 2
    assert message in capsys.readouterr().err
    assert commands.calls == []


def test_a_key_that_distil_would_set_to_the_same_value_is_no_mistake(tmp_path: Path, commands: Commands) -> None:
    given = ["prompts=p.txt", f"out={tmp_path / 'a'}", "stage1=['experiment=tiny','evaluation=none']", "stage2=[]"]
    assert main(["distil", "experiment=tiny_distil", *given]) == 0


def test_clips_that_do_not_exist_are_said_before_others_are_encoded(
    tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    for missing in ("source=nix", "held_out=nix"):
        assert main(line(tmp_path / "a", missing)) == 2
        assert f"error: {missing.partition('=')[0]}: 'nix' does not exist" in capsys.readouterr().err
    assert commands.calls == []


def test_a_folder_holds_the_work_on_one_source(tmp_path: Path, commands: Commands, capsys) -> None:
    out = tmp_path / "out"
    assert main(["distil", "experiment=tiny_distil", "source=clips", f"out={out}"]) == 0
    assert main(line(out)) == 0  # the evaluation may come later
    commands.calls.clear()
    for other in (["source=a", "held_out=others"], ["prompts=a.txt"], ["source=clips", "held_out=a"]):
        assert main(["distil", "experiment=tiny_distil", *other, f"out={out}"]) == 2
        assert "began with" in capsys.readouterr().err
    assert commands.calls == []


def test_too_few_held_out_clips_are_said_before_the_training(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "check_evaluation", check_evaluation)
    write_held_out(tmp_path / "out" / "held_out", 8)
    assert main(line(tmp_path / "out")) == 2
    advice = """give 'evaluate=["experiment=tiny_evaluate","held_out_samples=8"]'"""
    assert advice in capsys.readouterr().err
    assert commands.names() == []
