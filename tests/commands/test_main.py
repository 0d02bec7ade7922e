"""The command line: help, exit codes, errors as lines."""

from __future__ import annotations

import errno
import io
import os
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from anyflow_train import __main__ as cli
from anyflow_train.commands.completion import SCRIPTS
from anyflow_train.config.commands import PlanOptions
from anyflow_train.config.compose import MODELS, compose
from anyflow_train.config.options import compose_beside
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.sweep.combinations import combine, split_options

TINY = "experiment=tiny"


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if line.startswith("  ")] == list(cli.COMMANDS)
    assert cli.main([]) == 2


def test_help_and_version_need_nothing_heavy() -> None:
    program = (
        "import sys\nfrom anyflow_train.__main__ import main\n"
        "assert main(['--help']) == 0 and main(['--version']) == 0\n"
        "assert not {'hydra', 'pydantic', 'omegaconf', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_lists_its_keys(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    run = MODELS["train"]
    models = {
        "doctor": [],
        "completion": [],
        "sweep": [run, MODELS["sweep"]],
        **{key: [run] for key in ("check", "plan", "launch")},
    }
    models = models.get(command)
    models = [MODELS[command]] if models is None else models
    for field in (name for model in models for name in model.model_fields):
        assert f"    {field}: " in printed or f"\n{field}" in printed
    if run in models:
        assert "experiment=..." in printed
        assert "wan1_3b_forward_reference" in printed
        assert "student/adapter=..." in printed
        assert "    objective.rebalance: weighted | unweighted | sqrt | none = weighted" in printed
        assert "objective.kind=flow_map" in printed
    else:
        assert "wan1_3b_forward" not in printed


def _help_of(word: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert cli.main(["train", "--help", word]) == 0
    return capsys.readouterr().out.splitlines()


def test_help_of_some_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help", "rebalance_floor", "out"]) == 0
    printed = capsys.readouterr().out.splitlines()
    keys = [line.split(":")[0].strip() for line in printed if line[:5].strip()]
    assert {"out", "objective.rebalance_floor", "objective.text_dropout"} <= set(keys)
    assert len(keys) == len(set(printed) & {line for line in printed if line[:5].strip()})
    assert all("rebalance_floor" in key or "out" in key for key in keys)
    assert "    objective.epsilon: float = 0.005  [flow_map, lagrangian, mixed]" in _help_of("epsilon", capsys)
    assert "    student.gate_value: float = 0.25" in _help_of("gate_value", capsys)
    assert cli.main(["train", "--help", "rebalnce"]) == 2
    assert "no key contains 'rebalnce'; nearest is 'objective.rebalance'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [name for name, each in cli.COMMANDS.items() if not each.alone])
def test_a_command_alone_shows_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command]) == 2
    lines = capsys.readouterr().out.splitlines()
    examples = [shlex.split(line) for line in lines if line.startswith("  anyflow ")]
    assert examples
    for program, name, *arguments in examples:
        assert (program, name) == ("anyflow", command)
        if (subject := cli.COMMANDS[command].subject) and "=" not in arguments[0]:
            arguments[0] = f"{subject}={arguments[0]}"
        if command == "sweep":
            options, rest = split_options(arguments, None)
            assert combine(options, rest, None)
        elif command == "plan":
            compose_beside(PlanOptions, arguments, None, lambda options: options.world)
        elif command == "launch":
            compose("train", arguments[1:])
        elif command == "completion":
            assert arguments[0] in SCRIPTS
        else:
            arguments = cli.with_subject(cli.COMMANDS[command], arguments)
            compose("train" if command == "check" else command, arguments)


def test_every_command_exists() -> None:
    """Its module is a file of this package with that function: read, not imported, because most import torch."""
    package = Path(cli.__file__).parent
    for command in cli.COMMANDS.values():
        module, _, function = command.target.partition(":")
        path = package.joinpath(*module.split(".")[1:])
        source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
        assert f"def {function}(" in source or f"import {function}" in source, command.target


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["evaluat"], "error: evaluat: is not a command; nearest is 'evaluate' "),
        (["check", "--config-dir"], "error: --config-dir: needs a folder"),
        (["check", "--config-dir=/nowhere/at/all", TINY], "error: --config-dir: '/nowhere/at/all' is not a folder"),
        (["check", "--lr=3"], "error: --lr=3: is not an option"),
        (["check", TINY, "lr=3"], "error: lr: unknown key; nearest is 'optimizer.lr'"),
        (["check", TINY, "derivative=maybe"], "error: derivative: 'maybe' is wrong"),
        (["train", "experiments=tiny"], "error: experiments: unknown group; nearest is 'experiment'"),
        (["train", TINY, "notify=ftp://a"], "error: notify: 'ftp://a' is wrong: write an address that begins with"),
        (["export", "a", "out=b", "push=name"], "error: push: 'name' is wrong: write owner/name"),
        (["sample", "a", "out=b", "prompt=c", "calls=[0]"], "error: calls.0: 0 is wrong: it should be greater than"),
        (["sample", "a", "out=b", "prompt=c", "calls=[]"], "error: calls: [] is wrong: list should have at least 1"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(line)
    assert printed.err.count("\n") == 1


def test_one_value_is_a_list_of_one_and_checkpoint_another_name_of_model() -> None:
    config = compose("sample", ["checkpoint=a", "out=b", "prompt=c", "calls=2", "seeds=3"])
    assert (config.model, config.calls, config.seeds) == ("a", (2,), (3,))
    assert compose("demo", ["checkpoint=a"]).model == "a"


def test_a_folder_with_an_equals_sign_is_a_subject_too(tmp_path: Path) -> None:
    place = tmp_path / "lr=1"
    place.mkdir()
    command = cli.COMMANDS["report"]
    assert cli.with_subject(command, [str(place), "out=a.html"]) == [f"run='{place}'", "out=a.html"]
    assert cli.with_subject(command, ["run=a"]) == ["run=a"]


def test_outputs_that_are_closed_or_not_in_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", None)
    cli.prepare_streams()
    print("кот")
    print("nowhere", file=sys.stderr)
    sys.stderr.close()
    sys.stdout.flush()
    assert file.getvalue() == rb"\u043a\u043e\u0442" + b"\n"


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (UserError("data.shards", "'x' is not there"), 2, "error: data.shards: 'x' is not there\n"),
        (UserErrors([UserError("a", "b"), UserError("c", "d")]), 2, "error: a: b\nerror: c: d\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_a_command_raises(
    raised: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_target: str) -> None:
        raise raised

    monkeypatch.setattr(cli, "_load", fail)
    assert cli.main(["clips", "out=x"]) == code
    assert capsys.readouterr().err == words


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_target: str) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "_load", fail)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["clips", "out=x"])


def test_a_command_gets_its_decoded_config_and_warnings_go_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    received = []
    monkeypatch.setattr(cli, "_load", lambda _target: received.append)
    assert cli.main(["train", TINY, "steps=800", "optimizer.warmup_steps=900"]) == 0
    assert isinstance(received[0], MODELS["train"])
    assert capsys.readouterr().err.startswith("warning: optimizer.warmup_steps: 900 is not below steps=800")


def test_the_terminal_hears_of_a_warning_from_one_process_only(tmp_path: Path) -> None:
    """In a process of its own: others than process 0 move their output to a file, for good."""
    code = (
        "import sys; from anyflow_train import __main__ as cli; cli._load = lambda target: lambda config: None; "
        f"sys.exit(cli.main(['train', {TINY!r}, 'steps=800', 'optimizer.warmup_steps=900', 'out={tmp_path}']))"
    )
    said = {}
    for rank in ("0", "1"):
        environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "RANK": rank}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        said[rank] = done.stderr
    assert said["0"].startswith("warning: optimizer.warmup_steps")
    assert said["1"] == ""


def test_as_a_module_from_any_directory(tmp_path: Path) -> None:
    """What is written stays where it was written, what is shipped is found from anywhere."""
    # Buffered, whatever the suite's own environment says: then the output meets the closed pipe only at the end.
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-m", "anyflow_train", "check", TINY, "data.shards=here"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "\n  shards: here\n" in done.stdout
    assert list(tmp_path.iterdir()) == []
    # A reader that has seen enough is no error.
    piped = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert piped.stdout is not None
    piped.stdout.close()
    _, errors = piped.communicate()
    assert errors == b""


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO, errno.ENOSPC])
def test_a_disk_that_refuses_is_one_sentence(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where no code expects it: `Path.exists` raises PermissionError below a folder that may not be entered."""

    def fail(_overrides: list[str], _folder: Path | None) -> None:
        raise OSError(number, os.strerror(number), "/there")

    monkeypatch.setitem(sys.modules, "failing", types.SimpleNamespace(fail=fail))
    monkeypatch.setitem(cli.COMMANDS, "check", cli.Command("", "failing:fail", decoded=False))
    assert cli.main(["check", "experiment=tiny"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: /there: ")
    assert os.strerror(number) in line


def test_a_file_that_the_code_should_have_made_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_overrides: list[str], _folder: Path | None) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", "/there")

    monkeypatch.setitem(sys.modules, "failing", types.SimpleNamespace(fail=fail))
    monkeypatch.setitem(cli.COMMANDS, "check", cli.Command("", "failing:fail", decoded=False))
    with pytest.raises(FileNotFoundError):
        cli.main(["check", "experiment=tiny"])


def test_native_windows_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    assert cli.main(["train", "experiment=tiny"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: native Windows is not supported; use WSL 2, where one process trains"
    ]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["tr"], ["train"]),
        (["train", "experiment=wan14b_f"], ["experiment=wan14b_forward", "experiment=wan14b_forward_reference"]),
        (["train", "optimizer.l"], ["optimizer.lr="]),
        (["plan", "gpus"], ["gpus="]),
        (["sample", "mod"], ["model="]),
        (["export", "colour"], []),
    ],
)
def test_completion_knows_commands_choices_and_keys(
    words: list[str], found: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["completion", "words", *words]) == 0
    assert capsys.readouterr().out.split() == found


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_completion_script_is_valid(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out.replace("autoload -U bashcompinit && bashcompinit\n", "")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert cli.main(["completion", "fish"]) == 2
    assert "'fish' is not supported; valid are bash, zsh" in capsys.readouterr().err
