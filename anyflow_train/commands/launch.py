"""`anyflow launch STRATEGY ...`: train on all GPUs of this node, or on several nodes; or print the SLURM script."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from anyflow_train.config.paths import resource
from anyflow_train.errors import UserError


def run(arguments: Sequence[str], config_dir: Path | None) -> int:
    """Replace this process by the launcher `launch/train.sh`, which is shipped with the package.

    Args:
        arguments: strategy and the arguments of `anyflow train`; `slurm` alone prints the script for `sbatch`.
        config_dir: a folder of config files, as for `anyflow train`.

    Raises:
        UserError: no strategy is given, or there is no bash.
    """
    folder = resource("launch")
    if list(arguments) == ["slurm"]:
        print((folder / "slurm.sbatch").read_text(), end="")
        return 0
    bash = shutil.which("bash")
    if bash is None:
        raise UserError("launch", "needs bash; on native Windows train in one process with `anyflow train`")
    words = [*arguments, *(["--config-dir", str(config_dir)] if config_dir else [])]
    # The launcher starts `python`: it must be this one, also if its environment is not active.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    os.execve(bash, [bash, str(folder / "train.sh"), *words], {**os.environ, "PATH": path})
