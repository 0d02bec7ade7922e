"""`anyflow clips`: write a folder of mp4 clips with captions of moving shapes."""

from __future__ import annotations

from pathlib import Path

from anyflow_train.config.commands import ClipsConfig
from anyflow_train.files import check_writable
from anyflow_train.tiny.clips import write_clips
from anyflow_train.training.reporting.tasks import TaskProgress


def run(config: ClipsConfig) -> None:
    """Write the clips that are missing in `config.out`.

    Raises:
        UserError: the folder cannot be written, or has clips of a different count or seed.
    """
    check_writable(Path(config.out).expanduser())
    with TaskProgress("clips", config.count, config.log) as progress:
        paths = write_clips(Path(config.out).expanduser(), config.count, config.seed, progress.advance)
    progress.result(f"{len(paths)} clips with captions in {config.out}")
