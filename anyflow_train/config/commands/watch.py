"""Keys of `anyflow watch` and `anyflow report`."""

from __future__ import annotations

from anyflow_train.config.base import Model
from anyflow_train.config.commands.types import Port


class WatchConfig(Model):
    """`anyflow watch`: a page in the browser over the runs of a folder. Only this machine can open it.

    runs: folder of run directories and sweeps, or one run directory.
    port: port of the page; 0 takes any free one.
    """

    runs: str
    port: Port = 8787


class ReportConfig(Model):
    """`anyflow report`: the page of `anyflow watch` as one file, which needs no network.

    run: run directory, or a folder of several.
    out: the .html file to write.
    """

    run: str
    out: str = "report.html"
