"""Write mp4 files. A file appears only when it is complete."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anyflow_train.files import atomic_file

Frames = NDArray[np.uint8]
"""(F, H, W, 3) uint8 RGB."""


def to_frames(video: Tensor) -> Frames:
    """Convert a video (3, F, H, W) in [-1, 1] to frames. Values outside of the range are clipped."""
    scaled = video.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def write_h264(path: Path, frames: Frames, rate: int | Fraction, pixels: str, options: dict[str, str]) -> None:
    """Write frames as H.264.

    Args:
        path: mp4 file; its folder exists.
        frames: the frames.
        rate: frames per second.
        pixels: FFmpeg's name of the pixel format, such as yuv420p, for which the sizes must be even.
        options: options of libx264.
    """
    with atomic_file(path) as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
