"""A real launch of two processes, of which one hangs: it is named, with its activity, within the config's timeout."""

from __future__ import annotations

import signal

import pytest

from tests.training.helpers import write_latents
from tests.training.launched import Launch, fork, train_case

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]

# Seconds. A step takes 0.1 s on a quiet machine, and longer on a shared one.
TIMEOUT = 8
HANGS = {
    "process 1 stopped": ([1, "signal", 3, "itself", signal.SIGSTOP], "no report", 1),
    "process 0 stopped": ([0, "signal", 3, "itself", signal.SIGSTOP], "no report", 0),
    "process 1 without data": ([1, "hang", 3], "no progress", 1),
}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Launch]:
    """Start all launches at the same time, because most of the time is waiting."""
    folder = tmp_path_factory.mktemp("hangs")
    write_latents(folder / "shards")
    found = {}
    for hang, (fault, _, _) in HANGS.items():
        place = folder / hang.replace(" ", "-")
        place.mkdir()
        changes = {"name": "run", "data__shards": str(folder / "shards"), "engine__timeout_seconds": TIMEOUT}
        found[hang] = Launch(fork, "ddp", [train_case(place, fault, **changes)], place)
    return found


@pytest.mark.parametrize("hang", HANGS)
def test_a_process_that_hangs_is_named_in_time(launches: dict[str, Launch], hang: str) -> None:
    _, words, rank = HANGS[hang]
    launch = launches[hang]
    assert launch.ended() == 1  # torch's own timeout would take far longer, and say something else
    assert "step 3/" in launch.text()
    line = next(line for line in launch.text().splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {words} for ")
    assert f" process {rank} (" in line
    assert f" process {1 - rank} (" not in line
    # the waiting process names its step; the other one is named with its last report
    assert "step 4, " in line
    assert launch.text().count("error: ") == 1
    logs = launch.folder / "run" / "logs"
    noticed = [text for path in logs.iterdir() if "Stack traces of process" in (text := path.read_text())]
    assert line in "".join(noticed)
    # A process that was not given time by a busy machine may only see that process 0 is gone.
    assert all(f"error: {words}" in text or "error: lost contact with process 0" in text for text in noticed)
