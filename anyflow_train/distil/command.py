"""`anyflow distil`: shards, stage 1, stage 2, export and evaluation by one command, which resumes where it stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from anyflow_train.config.commands import DistilOptions
from anyflow_train.config.compose import compose
from anyflow_train.config.derived import world_size
from anyflow_train.data.manifest import MANIFEST
from anyflow_train.errors import UserError, UserErrors, raise_all
from anyflow_train.files import EXPORT_MARKER, check_own, read_object, replace_file
from anyflow_train.sweep.runner import Runner
from anyflow_train.text import markdown_table, quoted

INTERRUPTED = 130
PLAY = "Play it: `anyflow sample"
"""Beginning of the last line of a summary page, by which an earlier page is known."""
OWN = ("source", "prompts", "out", "name", "data.shards", "evaluation.held_out", "model", "models", "held_out")
WITHOUT_CLIPS = ("objective=lagrangian", "objective.source=student", "evaluation=none")
"""Arguments of both stages if there are only prompts: the points that the objective learns at come from noise."""


@dataclass(frozen=True)
class Part:
    """One command of the way.

    Attributes:
        name: name on the summary page, and of its arguments among the keys of `anyflow distil`.
        command: name of the command whose config the arguments make.
        arguments: its arguments.
        result: file that exists when the part is finished.
        after: results that it is made from; if one is newer, the part is repeated.
        finished: whether its result says that it is finished.
    """

    name: str
    command: str
    arguments: Sequence[str]
    result: Path
    after: tuple[Path, ...] = ()
    finished: Callable[[Path], bool] = Path.is_file

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
    plan = list(parts(options))
    _check(plan, options, config_dir)
    _check_files(Path(options.out).expanduser())
    runner = Runner(["--config-dir", str(config_dir)] if config_dir else [], jobs=1)
    with runner.forwarding(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for number, part in enumerate(plan, 1):
            code = _finish(part, f"{number}/{len(plan)}", options, runner)
            write_summary(Path(options.out).expanduser(), plan)
            if code:
                mend = "mend that, and " * (code == 2)  # the code of a user error
                print(f"{part.name} is not finished; {mend}start the same line again to go on", flush=True)
                return code
    print(f"wrote {Path(options.out) / 'summary.md'}")
    return 0


def parts(options: DistilOptions) -> Iterator[Part]:
    """List the commands, in order.

    Stage 2 is left out if it has no arguments, and the evaluation if there are no clips to compare with.
    """
    out = Path(options.out).expanduser()
    shards, held_out = out / "shards", out / "held_out"
    clips = "source" if options.prompts is None else "prompts"
    given = [(clips, getattr(options, clips), shards, "prepare")]
    if options.held_out is not None:
        given.append(("source", options.held_out, held_out, "prepare held-out clips"))
    for key, value, folder, name in given:
        made = [*options.prepare, f"{key}={quoted(str(value))}", f"out={quoted(str(folder))}"]
        yield Part(name, "prepare", made, folder / MANIFEST)
    common = [f"out={quoted(str(out))}", f"data.shards={quoted(str(shards))}"]
    common += [f"evaluation.held_out={quoted(str(held_out))}"] * (options.held_out is not None)
    first = out / "stage1"
    common += WITHOUT_CLIPS if options.prompts else ()
    made = [*options.stage1, *common, "name=stage1"]
    yield Part("stage 1", "train", made, first / "done.json", (), _is_trained)
    student = first
    if options.stage2:
        student, init = out / "stage2", f"student.init={quoted(str(first))}"
        made = [*options.stage2, *common, init, "name=stage2"]
        yield Part("stage 2", "train", made, student / "done.json", (first / "done.json",), _is_trained)
    done, pipeline = (student / "done.json",), out / "pipeline"
    made = [*options.export, f"model={quoted(str(student))}", f"out={quoted(str(pipeline))}", "overwrite=true"]
    yield Part("export", "export", made, pipeline / EXPORT_MARKER, done)
    if options.held_out is not None:
        models = ",".join(quoted(str(place)) for place in dict.fromkeys((first, student)))
        made = [*options.evaluate, f"models=[{models}]", f"held_out={quoted(str(held_out))}"]
        made.append(f"out={quoted(str(out / 'report'))}")
        yield Part("evaluate", "evaluate", made, out / "report" / "report.json", done)


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
    lines += ["", f"{PLAY} {out / 'pipeline'} prompt='...' out=videos`; its README shows how in diffusers."]
    replace_file(out / "summary.md", ("\n".join(lines) + "\n").encode())


def _finish(part: Part, place: str, options: DistilOptions, runner: Runner) -> int:
    """Run one part unless it is done. Returns its exit code; that of an interruption if it ended before its end."""
    if part.is_done():
        print(f"== {place} {part.name}: already finished", flush=True)
        return 0
    print(f"== {place} {part.name}", flush=True)
    launched = part.command == "train" and options.strategy is not None
    command = ["launch", str(options.strategy)] if launched else [part.command]
    Path(options.out).expanduser().mkdir(parents=True, exist_ok=True)
    code, _ = runner.call([*command, *part.arguments])
    return code or (0 if part.finished(part.result) else INTERRUPTED)


def _is_trained(result: Path) -> bool:
    return read_object(result).get("step", -1) >= read_object(result.with_name("config.json")).get("steps", 0)


def _check(plan: Sequence[Part], options: DistilOptions, config_dir: Path | None) -> None:
    """Compose the config of every part. Raises UserErrors with the name of the part before each key."""
    errors = [
        UserError(key, f"gives {word}, but distil sets this key itself, from source, prompts, held_out and out")
        for key in ("prepare", "stage1", "stage2", "export", "evaluate")
        for word in getattr(options, key)
        if word.partition("=")[0] in OWN
    ]
    for part in plan:
        try:
            compose(part.command, part.arguments, config_dir)
        except UserError as several:
            errors += [UserError(f"{part.name}: {one.where}", one.problem) for one in several.errors]
    raise_all(errors, UserErrors)


def _check_files(out: Path) -> None:
    """Check, before hours of work, that no file of the user is in the place of a result. Raises UserError."""
    check_own(out, PLAY, "summary.md")
    for folder, index in ((out / "pipeline", EXPORT_MARKER), (out / "report", "report.json")):
        check_own(folder, "", index, *(path.name for path in folder.glob("*")))
