"""The output folder of `anyflow prepare`: its lock and its settings."""

from __future__ import annotations

import fcntl
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from anyflow_train.data.index import parse_index
from anyflow_train.data.manifest import MANIFEST, parse_manifest
from anyflow_train.data.prepare.growth import next_generation
from anyflow_train.data.prepare.job import MAY_CHANGE, PreparePlan
from anyflow_train.data.prepare.ledger import PATTERN, Ledger
from anyflow_train.data.prepare.older import SETTINGS, SKIPPED
from anyflow_train.data.prepare.workers import Workers
from anyflow_train.errors import UserError
from anyflow_train.files import TEMPORARY, read_json, take_lock, write_json

LOCK = ".lock"
INDICES = "*.index.json"
# Files of a folder without samples.
OWN_FILES = (SETTINGS, PATTERN, SKIPPED, "text*.safetensors", ".shard-*.text.safetensors", "shard-*.tar", INDICES)
# A network file system can take this long to show a new file to other nodes.
VISIBLE_SECONDS = 90.0


@contextmanager
def lock_output(plan: PreparePlan, workers: Workers) -> Iterator[None]:
    """Lock the output folder, and compare its settings, or save them in a new folder.

    Raises:
        UserError: another job writes to the folder, the folder was started with other settings (the first such key is
            named), it contains other files, or this process does not see the folder of process 0.
    """
    if workers.is_main:
        plan.folder.mkdir(parents=True, exist_ok=True)
    else:
        _check_same(plan, workers, *workers.share("settings", ({}, "")))
    with open(plan.folder / LOCK, "a+") as lock:
        if workers.is_main:
            _take(lock, fcntl.LOCK_EX, plan.folder)
            check_settings(plan)
            for left_over in plan.folder.glob(f"{TEMPORARY}*"):
                left_over.unlink()
        if workers.size > 1:
            # All processes of a job share the lock. If process 0 dies, the others still keep a new job from writing the
            # same files.
            _take(lock, fcntl.LOCK_SH, plan.folder)
        if workers.is_main:
            workers.share("settings", (plan.settings, (plan.folder / SETTINGS).read_text()))
        yield


def check_settings(plan: PreparePlan) -> None:
    """Compare the settings with those of the folder, or save them in a new folder.

    A folder without samples starts anew, so that a start with a mistake does not refuse the next one. It keeps its
    encoded texts if settings and clips are the same.

    Raises:
        UserError: a setting differs (the key is named), or the folder contains other files.
    """
    path, folder = plan.folder / SETTINGS, plan.folder
    if path.exists():
        saved = read_json(path)
        indices = (parse_index(index.read_bytes()) for index in folder.glob(INDICES))
        if (folder / MANIFEST).exists() or any(index.entries for index in indices):
            return compare_settings(plan, saved)
        first = next_generation(Ledger(folder, ()), plan.wanted, retry=False)
        if saved == json.loads(json.dumps(plan.settings)) and plan.ledger().generations == (first,):
            return None
        for pattern in OWN_FILES:
            for left_over in folder.glob(pattern):
                left_over.unlink()
    elif others := sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")):
        raise UserError("out", f"{folder} holds other files ({others[0]}); name a new folder")
    write_json(path, plan.settings)


def compare_settings(plan: PreparePlan, saved: dict[str, Any]) -> None:
    """Compare the settings with those of the folder. Raises UserError: a setting differs (the key is named)."""
    wanted = dict(plan.settings)
    if "kind" not in saved:  # of an older version
        path = plan.folder / MANIFEST
        wanted["kind"] = saved["kind"] = parse_manifest(path.read_bytes(), str(path)).kind if path.exists() else ""
    saved = {key: value for key, value in saved.items() if key not in MAY_CHANGE}
    for key, before, now in _differences(saved, wanted):
        change = f"was {_shown(before)} and is now {_shown(now)}"
        change = "the files of the codec have changed" if key == "codec" else change
        raise UserError(key, f"{change} since {plan.folder} was started; change it back, or name another `out`")


def wait_until_all_are_there(plan: PreparePlan) -> None:
    """Wait until process 0 sees the shards of all processes. Raises UserError after `VISIBLE_SECONDS`."""
    ledger = plan.ledger()
    if not _appears(lambda: not ledger.unfinished()):
        missing = ledger.unfinished()[0].name
        problem = f"{plan.folder} lacks {missing}, which another process wrote; all nodes must share this folder"
        raise UserError("out", problem)


def _check_same(plan: PreparePlan, workers: Workers, wanted: dict[str, Any], file: str) -> None:
    here = f"on process {workers.rank} ({socket.gethostname()})"
    for key, main, own in _differences(wanted, json.loads(json.dumps(plan.settings))):
        raise UserError(key, f"is {own!r} {here}, but {main!r} on process 0; give all nodes the same files")
    path = plan.folder / SETTINGS
    if not _appears(lambda: path.exists() and path.read_text() == file):
        raise UserError("out", f"{plan.folder} {here} is not the folder of process 0; all nodes must share one folder")


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


def _shown(value: Any) -> str:
    """Show a setting as users write it."""
    if isinstance(value, list):
        return f"[{', '.join('x'.join(map(str, size)) for size in value)}]"
    return "not set" if value is None else repr(value)


def _take(file: TextIO, kind: int, folder: Path) -> None:
    if not take_lock(fcntl.flock, file.fileno(), kind, folder):
        raise UserError("out", f"another `anyflow prepare` is writing to {folder}; wait for it, or name another folder")
