"""Several real processes: one launch, many runs in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENGINES = {"ddp": None, "zero1": 1, "zero2": 2, "zero3": 3}


def launch(runs: list[tuple[str, dict[str, Any]]], log: Path, timeout: float = 240) -> None:
    """Train each run, by two gloo processes, under the engine that it names. Start-up is paid once for all."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command = [*launcher, "--config_file", str(ROOT / "launch" / "zero2.yaml"), "-m", "tests.training.several"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with log.open("w") as output:
        process = subprocess.run(
            [*command, json.dumps(runs)], stdout=output, stderr=output, env=environment, timeout=timeout, check=False
        )
    assert process.returncode == 0, log.read_text()[-4000:]


def main(runs: list[tuple[str, dict[str, Any]]]) -> None:
    """What each of the processes does."""
    import deepspeed.ops

    # DeepSpeed would compile a faster sum for one node, which takes longer than all of these runs.
    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    from tests.training.helpers import train

    for engine, config in runs:
        stage = ENGINES[engine]
        os.environ["ACCELERATE_USE_DEEPSPEED"] = str(stage is not None).lower()
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage or 0)
        train(config)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
