"""Keys of `anyflow runs`."""

from __future__ import annotations

from anyflow_train.config.base import Model


class RunsConfig(Model):
    """`anyflow runs`: a table of the runs in a folder.

    folder: folder of run directories and sweeps, or one run directory.
    prune: delete what is needed neither to resume nor to export. Running runs are left alone.
    """

    folder: str
    prune: bool = False
