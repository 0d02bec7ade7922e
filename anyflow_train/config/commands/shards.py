"""Keys of `anyflow shards`."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt

from anyflow_train.config.base import Model


class ShardsConfig(Model):
    """`anyflow shards FOLDER`: what a folder of shards holds.

    folder: folder or remote address of the shards.
    verify: read every sample, and compare its bytes with the checksum. Without it, equal clips are found only if their
        captions are equal too.
    held_out: shards that must not hold the same clips; null leaves the comparison out.
    pictures: number of samples on the contact sheet; 0 leaves it out.
    out: file of the contact sheet; null writes `contact_sheet.png` into the folder.
    codec: pipeline folder or hub id of the VAE; null uses the one that the shards name.
    threads: CPU threads of torch; 0 lets torch choose.
    """

    folder: str
    verify: bool = False
    held_out: str | None = None
    pictures: NonNegativeInt = 16
    out: str | None = None
    codec: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: NonNegativeInt = 0
