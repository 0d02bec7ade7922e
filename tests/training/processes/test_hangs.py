"""A process that hangs, in a real launch of two: who it is and where, within the time that the config gives it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.training.helpers import write_latents
from tests.training.launched import Launch, train_case

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]

# Seconds. A step takes 0.1 s, but others may want the processor too.
TIMEOUT = 8
HANGS = {
    "process 1 stopped": ([1, "signal", 3, "itself", signal.SIGSTOP], "no sign of life", 1),
    "process 0 stopped": ([0, "signal", 3, "itself", signal.SIGSTOP], "no sign of life", 0),
    "process 1 without data": ([1, "hang", 3], "nothing has moved", 1),
}


@pytest.mark.parametrize("hang", HANGS)
def test_a_process_that_hangs_is_named_in_time(tmp_path: Path, hang: str) -> None:
    fault, words, rank = HANGS[hang]
    write_latents(tmp_path / "shards")
    launch = Launch("ddp", [train_case(tmp_path, fault, name="run", engine__timeout_seconds=TIMEOUT)], tmp_path)
    launch.wait_for(lambda: "step 3/" in launch.text())
    assert launch.ended() == 1  # torch's own timeout would take far longer, and say something else
    line = next(line for line in launch.text().splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {words} for ")
    assert f" process {rank} (" in line
    assert f" process {1 - rank} (" not in line
    # the one that waits says at which step; of the other the last sign of life is known, or where it hangs
    assert "step 4, " in line
    assert launch.text().count("error: ") == 1
    noticed = [path for path in (tmp_path / "run" / "logs").iterdir() if "Where process" in path.read_text()]
    assert all(f"error: {words}" in path.read_text() for path in noticed)
    assert noticed
