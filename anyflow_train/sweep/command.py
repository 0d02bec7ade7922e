"""`anyflow sweep`: train every combination, and write one table; with an evaluation, one table and one plot."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from anyflow_train.config.commands import EvaluateConfig, SweepOptions
from anyflow_train.config.compose import compose
from anyflow_train.config.derived import world_size
from anyflow_train.data.manifest import MANIFEST, parse_manifest
from anyflow_train.data.remote import is_remote
from anyflow_train.errors import UserError, UserErrors, raise_all
from anyflow_train.files import read_json, read_object, replace_file, write_json
from anyflow_train.sweep import cluster
from anyflow_train.sweep.combinations import Combination, check_directories, combine, equalise, split_options
from anyflow_train.sweep.runner import Runner
from anyflow_train.sweep.search import Search
from anyflow_train.text import fit_terminal, markdown_table, quoted

SUCCESS, FAILURE, INTERRUPTED = 0, 1, 130


def run(arguments: Sequence[str], config_dir: Path | None) -> int:
    """Train all combinations that are not finished, and evaluate them. An interrupted run resumes from its checkpoint.

    Returns:
        0 if all combinations are finished, 1 if some failed, 130 if a signal stopped the sweep.

    Raises:
        UserErrors: errors of all combinations and of the evaluation, before the first run starts.
    """
    if world_size() > 1:
        raise UserError("WORLD_SIZE", f"{world_size()}, but a sweep starts its own runs; start it without a launcher")
    options, rest = split_options(arguments, config_dir)
    if options.sampler == "tpe":
        return _search(options, rest, config_dir)
    combinations = combine(options, rest, config_dir)
    evaluation = _evaluation(options, combinations, config_dir)
    _check_files(combinations)
    if options.equal_operations:
        equalise(combinations)
    check_directories(combinations)
    _read_costs(combinations)
    for combination in combinations:
        combination.update("waiting")
    runner = _runner(options, config_dir)
    with runner.forwarding(signal.SIGINT, signal.SIGTERM):
        if options.cluster == "none":
            runner.finish_all(combinations, lambda: _report(combinations))
        else:
            cluster.finish_all(combinations, options, runner.options, lambda: _report(combinations))
        finished = all(combination.state == "finished" for combination in combinations)
        code = SUCCESS
        if evaluation and finished:
            code = _evaluate(*evaluation, combinations, runner)
    print(fit_terminal(_report(combinations)))
    if runner.stopped:
        return INTERRUPTED
    return SUCCESS if finished and code == SUCCESS else FAILURE


def _search(options: SweepOptions, arguments: Sequence[str], config_dir: Path | None) -> int:
    """Search with Optuna. Returns the exit code."""
    search = Search(options, arguments, config_dir)
    runner = _runner(options, config_dir)
    with runner.forwarding(signal.SIGINT, signal.SIGTERM):
        combinations = search.run(runner, _report)
    print(fit_terminal(_report(combinations)))
    print(search.best())
    failed = any(one.state == "failed" for one in combinations)
    return INTERRUPTED if runner.stopped else FAILURE if failed else SUCCESS


def _runner(options: SweepOptions, config_dir: Path | None) -> Runner:
    """Make the runner. One run at a time has each GPU for itself, unless more jobs than GPUs were chosen."""
    gpus = visible_gpus()
    jobs = options.jobs or max(len(gpus), 1)
    return Runner(["--config-dir", str(config_dir)] if config_dir else [], jobs, gpus if jobs <= len(gpus) else ())


def table(combinations: Sequence[Combination]) -> str:
    """Format one row per combination, with the best metric at every step count that a run measured."""
    stem = combinations[0].config.evaluation.best_metric.rpartition("_")[0]
    measured = {name for combination in combinations for name in combination.summary.get("metrics", {})}
    family = [name for name in measured if name.rpartition("_")[0] == stem]
    family.sort(key=lambda name: int(name.rpartition("_")[2]))
    rows = [[*combinations[0].values, "state", "steps", "last loss", *family, "time", "CPU time"]]
    for combination in combinations:
        done = combination.summary
        numbers = [done.get("last_loss"), *(done.get("metrics", {}).get(name) for name in family)]
        shown = ["" if number is None else f"{number:.4g}" for number in numbers]
        times = [f"{done['seconds']:.0f} s", f"{combination.cpu_seconds:.0f} s"] if done else ["", ""]
        steps = str(combination.config.steps)
        rows.append([*combination.values.values(), combination.state, steps, *shown, *times])
    return "\n".join(markdown_table(rows)) + "\n"


def visible_gpus() -> list[str]:
    """List the GPUs that runs can use, by the names that CUDA_VISIBLE_DEVICES takes. Does not import torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return []
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]


def _evaluation(
    options: SweepOptions, combinations: Sequence[Combination], config_dir: Path | None
) -> tuple[list[str], EvaluateConfig] | None:
    """Return the arguments of the evaluation, and its config; None without an evaluation.

    Raises:
        UserErrors: errors of the key `evaluate`, or its held-out shards do not exist or hold too few clips.
    """
    if not options.evaluate:
        return None
    folder = combinations[0].folder.parent
    models = ",".join(quoted(str(one.folder)) for one in combinations)
    arguments = [*options.evaluate, f"models=[{models}]", f"out={quoted(str(folder / 'evaluation'))}"]
    return arguments, check_evaluation(options.evaluate, arguments, config_dir)


def check_evaluation(given: Sequence[str], arguments: Sequence[str], config_dir: Path | None) -> EvaluateConfig:
    """Compose the config of an evaluation, and count its held-out clips.

    Args:
        given: arguments that the user chose by the key `evaluate`.
        arguments: all arguments.

    Raises:
        UserErrors: errors of the key `evaluate`, or its held-out shards do not exist or hold too few clips.
    """
    try:
        config = compose("evaluate", arguments, config_dir)
    except UserErrors as several:
        raise UserErrors(several.within("evaluate")) from None
    if not is_remote(config.held_out):
        manifest = Path(config.held_out).expanduser() / MANIFEST
        if not manifest.is_file():
            problem = f"'{config.held_out}' has no {MANIFEST}; write it with `anyflow prepare`"
            raise UserError("evaluate: held_out", problem)
        held, needed = parse_manifest(manifest.read_bytes(), str(manifest)).samples, config.held_out_samples
        if held < needed:
            kept = [word for word in given if not word.startswith("held_out_samples=")]
            words = ",".join(f'"{word}"' for word in (*kept, f"held_out_samples={held}"))
            problem = f"'{config.held_out}' holds {held} clips, but held_out_samples={needed}; prepare more"
            raise UserError("evaluate: held_out", f"{problem}, or give 'evaluate=[{words}]'")
    return config


def _check_files(combinations: Sequence[Combination]) -> None:
    from anyflow_train.commands.preflight import check_files

    found = {str(error): error for one in combinations for error in check_files(one.config).errors}
    raise_all([*found.values()])


def _evaluate(
    arguments: Sequence[str], config: EvaluateConfig, combinations: Sequence[Combination], runner: Runner
) -> int:
    """Evaluate all runs, unless the report is newer than they are; then write the comparison."""
    from anyflow_train.sweep.board import write_board

    path = Path(config.out) / "report.json"
    wanted = config.model_dump(mode="json")
    newest = max((one.folder / "done.json").stat().st_mtime for one in combinations)
    if not (path.is_file() and path.stat().st_mtime > newest and read_object(path).get("config") == wanted):
        code, _ = runner.call(["evaluate", *arguments])
        if code:
            return code
    print(fit_terminal(write_board(combinations[0].folder.parent, combinations, read_object(path))))
    return SUCCESS


def _read_costs(combinations: Sequence[Combination]) -> None:
    """Take over the CPU times of earlier starts. Without them, if the file is damaged, the times begin at 0."""
    path = combinations[0].folder.parent / "sweep.json"
    with suppress(OSError, ValueError, TypeError, LookupError):
        spent = {row["label"]: float(row["cpu_seconds"]) for row in read_json(path)}
        for one in combinations:
            one.cpu_seconds = spent.get(one.label, 0.0)


def _report(combinations: Sequence[Combination]) -> str:
    """Write `sweep.md` and `sweep.json`, so that they exist even if the sweep is killed. Return the text to print."""
    folder, text = combinations[0].folder.parent, table(combinations)
    keys = ("step", "last_loss", "seconds", "metrics")
    facts = [
        {"label": one.label, "values": one.values, "state": one.state, "folder": str(one.folder)}
        | {"cpu_seconds": one.cpu_seconds, "operations": one.operations}
        | {key: one.summary.get(key) for key in keys}
        for one in combinations
    ]
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "sweep.md", text.encode())
    write_json(folder / "sweep.json", facts)
    failed = "".join(f"failed: {one.label}\n" for one in combinations if one.state == "failed")
    return f"{text}{failed}{folder / 'sweep.md'}\n{folder / 'sweep.json'}"
