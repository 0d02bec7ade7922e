"""Find the checkpoint that a run resumes from, and check that its config still fits."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

from anyflow_train.config.keys import flatten
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError, raise_all
from anyflow_train.text import is_within
from anyflow_train.training.checkpoints.config_file import decode_saved
from anyflow_train.training.checkpoints.inputs import SET_BACK, Inputs
from anyflow_train.training.checkpoints.reading import (
    CheckpointInfo,
    DamagedCheckpoint,
    set_aside,
    verify_checkpoint,
)
from anyflow_train.training.checkpoints.run_directory import RunDirectory
from anyflow_train.training.checkpoints.state import list_checkpoints

UNKNOWN = Inputs()
# Keys that may change between two starts of a run, because they do not change what is trained on which data. The
# micro-batch only changes how a step is split, and the order of its sums.
FREE_KEYS = (
    "name",
    "out",
    "steps",
    "log_every",
    "log",
    "max_nonfinite_steps",
    "profile",
    "checkpoint",
    "tracker",
    "evaluation.every",
    "evaluation.videos",
    "evaluation.reference_videos",
    "evaluation.batch",
    "data.workers",
    "data.max_bad_share",
    "data.cache",
    "data.cache_gib",
    "data.generations",
    "engine.device",
    "engine.threads",
    "engine.micro_batch",
    "engine.attention",
    "engine.frozen_precision",
    "engine.compile",
    "engine.sequence_parallel",
    "engine.timeout_seconds",
    "student.gradient_checkpointing",
    "on_policy.backward",
    "teacher.codec",
)


def check_finished(directory: RunDirectory, config: RunConfig, inputs: Inputs = UNKNOWN) -> str | None:
    """Return a message if the run has already done all its steps; None if there are steps left.

    If `done.json` or `config.json` is missing or damaged, the run resumes, and writes them again.

    Raises:
        UserErrors: the run is finished, but its config was different.
    """
    done = directory.read_done()
    step, before = (done or {}).get("step"), directory.read_config()
    if not isinstance(step, int) or step < config.steps or before is None:
        return None
    check_unchanged(before, config, str(directory.path), inputs)
    return f"{directory.path} is finished: {step} steps; increase steps to continue, or choose another name"


def find_resume_point(folder: Path, config: RunConfig, inputs: Inputs = UNKNOWN) -> CheckpointInfo | None:
    """Find the newest intact checkpoint; None if the run has none. Damaged ones are renamed, with a warning.

    A checkpoint without permission is not damaged: the run must not go back to an older one.

    Raises:
        UserError: checkpoints exist but `checkpoint.resume` is `never`, or all of them are damaged, or the newest one
            may not be read, or the config has changed so that the run cannot resume.
    """
    found = list_checkpoints(folder)
    if found and config.checkpoint.resume == "never":
        problem = f"is 'never', but {folder} contains {found[-1].name}; use 'auto' or another name"
        raise UserError("checkpoint.resume", problem)
    damaged: dict[Path, DamagedCheckpoint] = {}
    for path in reversed(found):
        try:
            info = verify_checkpoint(path)
        except DamagedCheckpoint as damage:
            cause = damage.__cause__
            if isinstance(cause, OSError) and cause.errno == errno.EACCES:
                raise UserError.of_file(cause, path) from cause
            damaged[path] = damage
            continue
        check_unchanged(info.config, config, str(path), inputs)
        for bad, damage in damaged.items():
            # Not read again, and not overwritten.
            print(f"warning: {damage}; moved to {set_aside(bad).name}, resuming from {path.name}", file=sys.stderr)
        return info
    if damaged:
        problem = f"every checkpoint is damaged ({'; '.join(map(str, damaged.values()))}); delete the run or rename it"
        raise UserError(str(folder), problem)
    return None


def check_unchanged(saved: dict[str, Any], config: RunConfig, where: str, inputs: Inputs = UNKNOWN) -> None:
    """Compare a saved config with the current one.

    Args:
        where: file or folder that it was read from, for errors.
        inputs: facts about the content of inputs. If they are known, they are compared in place of the paths.

    Raises:
        UserErrors: one line for every changed key that must not change. UserError: another version wrote it.
    """
    before = flatten(decode_saved(saved, where).model_dump(mode="json"))
    now = flatten(config.model_dump(mode="json"))
    same = inputs.compared()
    keys = sorted((before.keys() | now.keys()) - same.keys())
    changed = [key for key in keys if before.get(key) != now.get(key)]
    errors = [
        UserError(key, f"is {now.get(key)!r}, but the run began with {before.get(key)!r}; {SET_BACK}")
        for key in changed
        if not is_within(key, FREE_KEYS)
    ]
    others = [key for key, equal in same.items() if not equal]
    errors += [UserError(key, inputs.problem(key, before.get(key), now.get(key), where)) for key in others]
    raise_all(errors)
