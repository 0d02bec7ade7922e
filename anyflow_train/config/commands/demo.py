"""Keys of `anyflow demo`."""

from __future__ import annotations

from anyflow_train.config.commands.sampling import ClipConfig
from anyflow_train.config.commands.types import Port


class DemoConfig(ClipConfig):
    """`anyflow demo`: a page in the browser that makes clips. Only this machine can open it.

    teacher: network that makes clips from the same noise, to compare with: pipeline folder, hub id or run; null shows
        the model alone.
    port: port of the page; 0 takes any free one.
    guidance_scale: CFG scale w of networks that take Euler steps, such as the teacher; 1 means no guidance.
    """

    teacher: str | None = None
    port: Port = 7860
