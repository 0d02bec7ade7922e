"""`anyflow distil`: shards, stage 1, stage 2, export and evaluation by one command, which resumes where it stopped."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anyflow_train.config.commands import DistilOptions
from anyflow_train.config.compose import compose
from anyflow_train.config.derived import world_size
from anyflow_train.config.objective import ObjectiveConfig
from anyflow_train.data.manifest import MANIFEST
from anyflow_train.errors import UserError, UserErrors, raise_all
from anyflow_train.files import EXPORT_MARKER, check_own, read_object, replace_file, write_json
from anyflow_train.sweep.command import check_evaluation, visible_gpus
from anyflow_train.sweep.runner import Runner
from anyflow_train.text import markdown_table, quoted

INTERRUPTED = 130
INPUTS = "inputs.json"
"""File of the clips and prompts that a folder began with."""
COMMAND = "anyflow distil"
"""Text in this file, by which an earlier one is known."""
PLAY = "Play it: `anyflow sample"
"""Beginning of the last line of a summary page, by which an earlier page is known."""
WITHOUT_CLIPS = ("objective=lagrangian", "objective.source=student", "evaluation=none")
"""Arguments of both stages if there are only prompts: the points that the objective learns at come from noise."""


@dataclass(frozen=True)
class Part:
    """One command of the way.

    Attributes:
        name: name on the summary page, and of its arguments among the keys of `anyflow distil`.
        command: name of the command whose config the arguments make.
        given: its arguments that the user may choose.
        own: its arguments that `anyflow distil` sets, after those.
        result: file that exists when the part is finished.
        after: results that it is made from; if one is newer, the part is repeated.
        finished: whether its result says that it is finished.
    """

    name: str
    command: str
    given: Sequence[str]
    own: Sequence[str]
    result: Path
    after: tuple[Path, ...] = ()
    finished: Callable[[Path], bool] = Path.is_file

    @property
    def arguments(self) -> list[str]:
        """All arguments of the command."""
        return [*self.given, *self.own]

    def is_done(self) -> bool:
        """Whether the result is complete and not older than what it is made from."""
        if not self.finished(self.result):
            return False
        made = self.result.stat().st_mtime
        return all(path.is_file() and path.stat().st_mtime <= made for path in self.after)


def run(arguments: Sequence[str], config_dir: Path | None) -> int:
    """Do what is not finished yet. The same line resumes after an interruption.

    Returns:
        0 if all is finished, else the exit code of the part that ended early (130 after Ctrl-C, 75 to start again).

    Raises:
        UserErrors: errors of the configs of all parts, before the first one starts.
    """
    if world_size() > 1:
        raise UserError("WORLD_SIZE", f"{world_size()}, but distil starts its own processes; use no launcher")
    options = compose("distil", arguments, config_dir)
    every = list(parts(options))
    plan = [part for part in every if part.name != "evaluate" or options.held_out is not None]
    configs = _check(every, plan, config_dir, _processes(options))
    _check_files(Path(options.out).expanduser())
    _check_inputs(options, Path(options.out).expanduser())
    if plan[-1].name == "evaluate":
        plan[-1] = _with_reference(plan[-1], configs["stage 2" if options.stage2 else "stage 1"].objective)
    runner = Runner(["--config-dir", str(config_dir)] if config_dir else [], jobs=1)
    with runner.forwarding(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for number, part in enumerate(plan, 1):
            if part.name == "prepare" and options.held_out is not None:
                check_evaluation(options.evaluate, plan[-1].arguments, config_dir)
            code = _finish(part, f"{number}/{len(plan)}", options, runner)
            write_summary(Path(options.out).expanduser(), plan)
            if code:
                mend = "mend that, and " * (code == 2)  # the code of a user error
                print(f"{part.name} is not finished; {mend}start the same line again to go on", flush=True)
                return code
    print(f"wrote {Path(options.out) / 'summary.md'}")
    return 0


def parts(options: DistilOptions) -> Iterator[Part]:
    """List the commands, in order. Stage 2 is left out if it has no arguments."""
    out = Path(options.out).expanduser()
    shards, held_out = out / "shards", out / "held_out"
    clips = "source" if options.prompts is None else "prompts"
    given = [("source", options.held_out, held_out, "prepare held-out clips")] * (options.held_out is not None)
    given += [(clips, getattr(options, clips), shards, "prepare")]
    for key, value, folder, name in given:
        own = (f"{key}={quoted(str(value))}", f"out={quoted(str(folder))}")
        yield Part(name, "prepare", options.prepare, own, folder / MANIFEST)
    common = [f"out={quoted(str(out))}", f"data.shards={quoted(str(shards))}"]
    if options.held_out is not None:
        common.append(f"evaluation.held_out={quoted(str(held_out))}")
    elif not any(word.startswith("evaluation.held_out=") for word in (*options.stage1, *options.stage2)):
        common.append("evaluation.held_out=null")  # an experiment may name shards that are not there
    common += WITHOUT_CLIPS if options.prompts else ()
    student = first = out / "stage1"
    own = [*common, "name=stage1"]
    yield Part("stage 1", "train", options.stage1, own, first / "done.json", (), _is_trained)
    if options.stage2:
        student = out / "stage2"
        own = [*common, f"student.init={quoted(str(first))}", "name=stage2"]
        after = (first / "done.json",)
        yield Part("stage 2", "train", options.stage2, own, student / "done.json", after, _is_trained)
    done, pipeline, report = (student / "done.json",), out / "pipeline", out / "report"
    own = [f"model={quoted(str(student))}", f"out={quoted(str(pipeline))}", "overwrite=true"]
    yield Part("export", "export", options.export, own, pipeline / EXPORT_MARKER, done)
    models = ",".join(quoted(str(place)) for place in dict.fromkeys((first, student)))
    own = [f"models=[{models}]", f"held_out={quoted(str(held_out))}", f"out={quoted(str(report))}"]
    yield Part("evaluate", "evaluate", options.evaluate, own, report / "report.json", done)


def write_summary(out: Path, plan: Sequence[Part]) -> None:
    """Write `summary.md`: what is finished, where it is, and the tables of the evaluation."""
    rows = [["part", "state", "finished", "result"]]
    for part in plan:
        done = part.is_done()
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(part.result.stat().st_mtime)) if done else ""
        rows.append([part.name, "finished" if done else "not finished", when, f"`{part.result.parent}`"])
    lines = [f"# {out.name}", "", *markdown_table(rows), ""]
    report = out / "report" / "report.md"
    if report.is_file():
        # The pictures lie next to the report.
        lines += report.read_text().replace("](", "](report/").splitlines()
    pipeline = shlex.quote(str(out / "pipeline"))
    lines += ["", f"{PLAY} {pipeline} prompt='...' out=videos`; its README shows how in diffusers."]
    replace_file(out / "summary.md", ("\n".join(lines) + "\n").encode())


def _finish(part: Part, place: str, options: DistilOptions, runner: Runner) -> int:
    """Run one part unless it is done. Returns its exit code; that of an interruption if it ended before its end."""
    if part.is_done():
        print(f"== {place} {part.name}: already finished", flush=True)
        return 0
    print(f"== {place} {part.name}", flush=True)
    launched = part.command == "train" and options.strategy is not None
    command = ["launch", str(options.strategy)] if launched else [part.command]
    code, _ = runner.call([*command, *part.arguments])
    return code or (0 if part.finished(part.result) else INTERRUPTED)


def _with_reference(part: Part, objective: ObjectiveConfig) -> Part:
    """Compare a guided student with the guided teacher, unless the user chose what to compare with."""
    chosen = any(word.startswith(("reference=", "guidance_scale=")) for word in part.given)
    if chosen or objective.held_scale <= 1:
        return part
    return replace(part, own=[*part.own, "reference=guided_teacher", f"guidance_scale={objective.held_scale}"])


def _is_trained(result: Path) -> bool:
    return read_object(result).get("step", -1) >= read_object(result.with_name("config.json")).get("steps", 0)


def _processes(options: DistilOptions) -> int:
    """Count the processes of the training, as the launcher will."""
    if options.strategy in (None, "single"):
        return 1
    given = os.environ.get("NPROC", "")
    return int(given) if given.isdecimal() else max(len(visible_gpus()), 1)


def _check(every: Sequence[Part], plan: Sequence[Part], config_dir: Path | None, processes: int) -> dict[str, Any]:
    """Check that the user gives no argument that would be replaced, or dropped with its part, and compose all configs.

    Args:
        processes: number of processes that the stages must fit.

    Returns:
        The config of each part, by the part's name.

    Raises:
        UserErrors: what is wrong, with the name of the part before each key.
    """
    errors: list[UserError] = []
    for part in every:
        own = {word.partition("=")[0]: word for word in part.own}
        replaced = {word: own.get(word.partition("=")[0], word) for word in part.given}
        problem = "gives {}, but distil sets this key itself, from its own keys: {}"
        errors += [UserError(part.name, problem.format(word, ours)) for word, ours in replaced.items() if ours != word]
    configs = {}
    for part in plan:
        try:
            configs[part.name] = compose(part.command, part.arguments, config_dir, processes)
        except UserError as several:
            errors += several.within(part.name)
    raise_all(errors, UserErrors)
    return configs


def _check_inputs(options: DistilOptions, out: Path) -> None:
    """Check that clips and prompts exist if they are still needed, and are those that the folder began with.

    Raises:
        UserError: a file does not exist, or the folder holds work on others.
    """
    began, inputs = read_object(out / INPUTS), options.model_dump(include={"source", "prompts", "held_out"})
    for key, value in inputs.items():
        prepared = out / ("held_out" if key == "held_out" else "shards") / MANIFEST
        if value is not None and not prepared.is_file() and not Path(value).expanduser().exists():
            raise UserError(key, f"'{value}' does not exist")
        before = began.get(key)
        if before not in (None, value) and (key != "held_out" or value is not None):
            problem = f"is {value or 'null'}, but the work in '{out}' began with {before}"
            raise UserError(key, f"{problem}; set it back or choose another out")
    out.mkdir(parents=True, exist_ok=True)
    known = {key: value for key, value in inputs.items() if value is not None}
    write_json(out / INPUTS, began | {"command": COMMAND} | known)


def _check_files(out: Path) -> None:
    """Check, before hours of work, that no file of the user is in the place of a result. Raises UserError."""
    check_own(out, PLAY, "summary.md")
    check_own(out, COMMAND, INPUTS)
    for name, mark, index in (("pipeline", '"anyflow_train"', EXPORT_MARKER), ("report", '"held_out"', "report.json")):
        check_own(out / name, mark, index, *(path.name for path in (out / name).glob("*")))
