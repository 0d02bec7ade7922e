"""The command line: `anyflow <command> [group=choice ...] [key=value ...]`, also `python -m anyflow_train`."""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from anyflow_train import __version__
from anyflow_train.commands.quiet import silence_loading_bars
from anyflow_train.errors import OF_THE_DISK, ConfigWarning, LostProcess, SharedErrors, UserError, raise_all
from anyflow_train.text import nearest_hint, quoted
from anyflow_train.training.processes import launched

LOST_PROCESS = 1
USER_ERROR = 2
_PYTHONS_WARNING = warnings.showwarning
INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """One command.

    summary: one line for `anyflow --help`.
    target: `module:function`, imported only when the command runs.
    decoded: if True, the function takes the decoded config; else the overrides as written and the config folder.
    subject: key that an argument without `=` stands for, in first place; None if the command has no single subject.
    alone: whether the command does something without arguments.
    """

    summary: str
    target: str
    decoded: bool = True
    subject: str | None = None
    alone: bool = False


COMMANDS = {
    "distil": Command("the whole way: shards, both stages, export", "anyflow_train.distil.command:run", decoded=False),
    "clips": Command("render clips and captions of an embedded world", "anyflow_train.commands.clips:run"),
    "prepare": Command("encode clips and captions into shards", "anyflow_train.commands.prepare:run"),
    "shards": Command("show what shards hold", "anyflow_train.commands.shards:run", subject="folder"),
    "check": Command("check a run's config and print it", "anyflow_train.commands.check:run", decoded=False),
    "plan": Command("estimate memory, time and cost of a run", "anyflow_train.plan.command:run", decoded=False),
    "train": Command("train a teacher or a student", "anyflow_train.commands.train:run"),
    "sweep": Command("train every combination of values", "anyflow_train.sweep.command:run", decoded=False),
    "evaluate": Command(
        "compare teacher and students at several numbers of calls", "anyflow_train.evaluation.evaluate:run"
    ),
    "sample": Command("make videos from prompts", "anyflow_train.commands.sample:run", subject="model"),
    "doctor": Command(
        "check whether training can run on this machine", "anyflow_train.commands.doctor:run", decoded=False, alone=True
    ),
    "bench": Command("check and measure steps on this GPU", "anyflow_train.bench.command:run", alone=True),
    "export": Command("export a checkpoint for diffusers or ComfyUI", "anyflow_train.export:run", subject="model"),
    "runs": Command("list runs, and delete what they do not need", "anyflow_train.commands.runs:run", subject="folder"),
    "watch": Command("watch runs in a browser", "anyflow_train.watch.server:run", subject="runs"),
    "demo": Command("make clips on a page in the browser", "anyflow_train.demo.command:run", subject="model"),
    "report": Command("write the page of a run as one file", "anyflow_train.watch.report:run", subject="run"),
    "completion": Command(
        "print the completion script of bash or zsh", "anyflow_train.commands.completion:run", decoded=False
    ),
    "launch": Command("train on several GPUs or nodes", "anyflow_train.commands.launch:run", decoded=False),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Exit codes: 0; 1 (a run of a sweep failed, or a process of the run died); 2 (user error); 75 (a scheduler
    interrupted the run: start it again); 130 (Ctrl-C).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if sys.platform == "win32":
        print("error: native Windows is not supported; use WSL 2, where one process trains", file=sys.stderr)
        return USER_ERROR
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = _dispatch(arguments)
        sys.stdout.flush()  # a closed pipe must raise here, inside the try, and not at exit
        return launched.record_exit_code(code, everywhere=True)
    except UserError as error:
        return _report(error.errors, everywhere=isinstance(error, SharedErrors))
    except LostProcess as error:
        print(f"error: {error}", file=sys.stderr)
        return LOST_PROCESS
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # `Path.exists` and its relatives raise PermissionError too, for a path below a folder that may not be entered.
        if isinstance(error, OSError) and error.errno in OF_THE_DISK:
            return _report([UserError.of_file(error, "a file")], everywhere=False)
        # A bug: this process's output, with the traceback, may go to a log file only
        launched.print_to_terminal("error: a process failed; see its log in the run directory")
        raise


def script() -> NoReturn:
    """Run `main` and exit the process."""
    prepare_streams()
    launched.exit_process(main())


def prepare_streams() -> None:
    """Escape letters that the encoding of an output lacks, and replace an output that the caller closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the process lives)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("--version", "-V"):
        print(f"anyflow_train {__version__}")
        return 0
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0 if arguments else USER_ERROR
    name, *rest = arguments
    command = COMMANDS.get(name) or _extensions().get(name)
    if command is None:
        raise UserError(name, f"is not a command{nearest_hint(name, COMMANDS)} (valid: {', '.join(COMMANDS)})")
    overrides, config_dir, wants_help = _options(rest)
    if wants_help:
        from anyflow_train.config.help import command_help

        print(command_help(name, command.summary, config_dir, overrides))
        return 0
    if not overrides and name in COMMANDS and not command.alone:
        from anyflow_train.config.help import short_help

        print(short_help(name, command.summary, config_dir))
        return USER_ERROR
    return _run(name, command, with_subject(command, overrides), config_dir)


def with_subject(command: Command, arguments: list[str]) -> list[str]:
    """Give a first argument without `key=` the key that it stands for. A folder's name may contain `=`."""
    if command.subject and arguments and ("=" not in arguments[0] or os.path.exists(arguments[0])):
        return [f"{command.subject}={quoted(arguments[0])}", *arguments[1:]]
    return arguments


def _extensions() -> dict[str, Command]:
    """Find the commands of other packages; called only if needed, because it takes as long as an import."""
    from anyflow_train.config.extensions import find_extensions

    return {name: Command(extension.summary, extension.target) for name, extension in find_extensions().items()}


def _run(name: str, command: Command, overrides: list[str], config_dir: Path | None) -> int:
    if not command.decoded:
        return _load(command.target)(overrides, config_dir)
    from anyflow_train.commands.preflight import check_files
    from anyflow_train.config.compose import compose
    from anyflow_train.config.derived import world_size
    from anyflow_train.config.rules.run import run_warnings

    launched.register_with_launcher()
    config = compose(name, overrides, config_dir)
    if name == "train":
        launched.send_output_to(Path(config.out).expanduser() / config.name / "logs")
        raise_all(check_files(config).errors)
        for finding in run_warnings(config, world_size()):
            warnings.warn(str(finding.error()), ConfigWarning, stacklevel=1)
    result = _load(command.target)(config)
    return result if isinstance(result, int) else 0  # only train returns an exit code


def _load(target: str) -> Any:
    module, _, function = target.partition(":")
    if module not in sys.modules:
        _import(module)
    silence_loading_bars()
    return getattr(sys.modules[module], function)


def _import(module: str) -> None:
    """Import without garbage collection, which takes a sixth of the import time of torch and diffusers.

    Nearly all imported objects stay alive, so they are also excluded from later collections.
    """
    gc.disable()
    try:
        importlib.import_module(module)
        gc.freeze()
    finally:
        gc.enable()


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Show a ConfigWarning as one line on process 0, and any other warning as Python does."""
    if not issubclass(category, ConfigWarning):
        _PYTHONS_WARNING(message, category, *place, **more)
    elif launched.rank() == 0:
        print(f"warning: {message}", file=sys.stderr)


def _options(arguments: list[str]) -> tuple[list[str], Path | None, bool]:
    """Split the arguments into overrides, the value of --config-dir, and whether --help is given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", nargs="?", const="", type=str)
    parser.add_argument("--help", "-h", action="store_true")
    options, overrides = parser.parse_known_args(arguments)
    if options.config_dir == "":
        raise UserError("--config-dir", "needs a folder")
    for argument in overrides:
        if argument.startswith("-"):
            raise UserError(argument, "is not an option; use --help, --config-dir FOLDER or key=value")
    return overrides, None if options.config_dir is None else Path(options.config_dir), options.help


def _overview() -> str:
    lines = [
        "Distil a Wan2.1 video diffusion teacher into an any-step student.",
        "",
        "usage: anyflow <command> [group=choice ...] [key=value ...] [--config-dir FOLDER]",
        "",
        *(f"  {name:<12}{command.summary}" for name, command in (COMMANDS | _extensions()).items()),
        "",
        "`anyflow <command>` shows examples and the experiments of a command, `anyflow <command> --help` all keys,",
        "`anyflow <command> --help WORD` the keys that contain a word. Start with `anyflow check experiment=tiny`.",
    ]
    return "\n".join(lines)


def _report(errors: Sequence[UserError], everywhere: bool) -> int:
    for error in errors:
        if launched.owns_terminal():
            print(f"error: {error}", file=sys.stderr)
        if not everywhere:
            launched.print_to_terminal(f"error: {error}")
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return launched.record_exit_code(USER_ERROR, everywhere or alone)


if __name__ == "__main__":
    script()
