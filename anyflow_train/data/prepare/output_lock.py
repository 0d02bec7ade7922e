"""The output folder of `anyflow prepare`: its lock, its settings, and the share of each process."""

from __future__ import annotations

import fcntl
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from anyflow_train.data.prepare.job import PreparePlan, ShardPlan
from anyflow_train.data.prepare.workers import Workers
from anyflow_train.errors import UserError
from anyflow_train.files import TEMPORARY, take_lock, write_json

SETTINGS = "prepare.json"
LOCK = ".lock"
# A network file system can take this long to show a new file to other nodes.
VISIBLE_SECONDS = 90.0


@dataclass(frozen=True)
class WorkShare:
    """The work of one process.

    Attributes:
        shards: shards that this process writes.
        texts: those of `shards` whose texts are not encoded yet.
        clips, text_clips: clips of all processes in the second and in the first pass.
    """

    shards: list[ShardPlan]
    texts: list[ShardPlan]
    clips: int
    text_clips: int


@contextmanager
def lock_output(plan: PreparePlan, workers: Workers) -> Iterator[WorkShare]:
    """Lock the output folder, and yield this process's share of the remaining work.

    Only process 0 looks at the results of an earlier job, and distributes the missing shards. Other processes must not
    look for themselves, because some of them are already writing.

    Raises:
        UserError: another job writes to the folder, the folder was started with other settings (the first such key is
            named), it contains other files, or this process does not see the folder of process 0.
    """
    if workers.is_main:
        plan.folder.mkdir(parents=True, exist_ok=True)
        with open(plan.folder / LOCK, "a+") as lock:
            _take(lock, fcntl.LOCK_EX, plan.folder)
            check_settings(plan)
            for left_over in plan.folder.glob(f"{TEMPORARY}*"):
                left_over.unlink()
            if workers.size > 1:
                # All processes of a job share the lock. If process 0 dies, the others still keep a new job from
                # writing the same files.
                _take(lock, fcntl.LOCK_SH, plan.folder)
            yield _share(plan, workers, workers.share(_job(plan)))
        return
    job = workers.share({})
    _check_same(plan, workers, job["settings"])
    with open(plan.folder / LOCK, "a+") as lock:
        _take(lock, fcntl.LOCK_SH, plan.folder)
        yield _share(plan, workers, job)


def check_settings(plan: PreparePlan) -> None:
    """Compare the settings with those of the folder, or save them in a new folder.

    Raises:
        UserError: a setting differs (the key is named), or the folder contains other files.
    """
    path = plan.folder / SETTINGS
    if not path.exists():
        others = sorted(entry.name for entry in plan.folder.iterdir() if not entry.name.startswith("."))
        if others:
            raise UserError("out", f"{plan.folder} holds other files ({others[0]}); name a new folder")
        write_json(path, plan.settings)
        return
    changes = {"source": "the list of clips has changed", "codec": "the files of the codec have changed"}
    for key, before, now in _differences(json.loads(path.read_text()), plan.settings):
        change = changes.get(key, f"was {before!r} and is now {now!r}")
        raise UserError(key, f"{change} since {plan.folder} was started; change it back, or name another `out`")


def wait_until_all_are_there(plan: PreparePlan) -> None:
    """Wait until process 0 sees the shards of all processes. Raises UserError after `VISIBLE_SECONDS`."""
    if not _appears(lambda: not plan.unfinished()):
        missing = plan.unfinished()[0].name
        problem = f"{plan.folder} lacks {missing}, which another process wrote; all nodes must share this folder"
        raise UserError("out", problem)


def _job(plan: PreparePlan) -> dict[str, Any]:
    shards = plan.unfinished()
    present = {entry.name for entry in plan.folder.iterdir()}
    texts = [shard.name for shard in shards if shard.text_name not in present]
    return {"settings": plan.settings, "shards": [shard.name for shard in shards], "texts": texts}


def _share(plan: PreparePlan, workers: Workers, job: dict[str, Any]) -> WorkShare:
    by_name = {shard.name: shard for shard in plan.shards}
    clips = {name: len(by_name[name].clips) for name in job["shards"]}
    mine = [by_name[name] for name in job["shards"][workers.rank :: workers.size]]
    without_texts = set(job["texts"])
    texts = [shard for shard in mine if shard.name in without_texts]
    return WorkShare(mine, texts, sum(clips.values()), sum(clips[name] for name in without_texts))


def _check_same(plan: PreparePlan, workers: Workers, wanted: dict[str, Any]) -> None:
    here = f"on process {workers.rank} ({socket.gethostname()})"
    for key, main, own in _differences(wanted, json.loads(json.dumps(plan.settings))):
        raise UserError(key, f"is {own!r} {here}, but {main!r} on process 0; give all nodes the same files")
    if not _appears(lambda: _read_settings(plan.folder) == wanted):
        raise UserError("out", f"{plan.folder} {here} is not the folder of process 0; all nodes must share one folder")


def _read_settings(folder: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        return json.loads((folder / SETTINGS).read_text())
    return None


def _appears(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(1.0)
    return True


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)


def _take(file: TextIO, kind: int, folder: Path) -> None:
    if not take_lock(fcntl.flock, file.fileno(), kind, folder):
        raise UserError("out", f"another `anyflow prepare` is writing to {folder}; wait for it, or name another folder")
