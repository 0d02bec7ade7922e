"""Keys of `anyflow clips`."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt

from anyflow_train.config.base import Log, Model


class ClipsConfig(Model):
    """`anyflow clips`: render mp4 clips of moving shapes, with captions.

    out: folder for the clips.
    count: number of clips.
    log: auto (a bar on a terminal, plain lines elsewhere), plain, or json (one JSON object per line).
    """

    out: str
    count: PositiveInt = 256
    seed: NonNegativeInt = 0
    log: Log = "auto"
