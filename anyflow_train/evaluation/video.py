"""Videos to files: mp4 for playing, GIF for README files. A file appears whole or not at all."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from anyflow_train.files import atomic_file

Frames = NDArray[np.uint8]
"""(F, H, W, 3) uint8 RGB."""


def to_frames(video: Tensor) -> Frames:
    """A decoded video (3, F, H, W) in [-1, 1] -> frames; values outside of the range are clipped."""
    scaled = video.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def write_mp4(path: Path, frames: Frames, fps: float) -> None:
    """Write H.264 that browsers play; odd sizes are padded by one pixel, which the format demands."""
    padded = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file, av.open(file, "w", format="mp4") as container:
        # These make the file a function of its frames: libx264's own number of threads differs between machines, and
        # with AVX-512 it plans by memory that it never set.
        options = {"crf": "16", "threads": "1", "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = padded.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in padded:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_gif(path: Path, frames: Frames, fps: float, colours: int = 64) -> None:
    """Write an endless GIF with one palette for all frames, so that it stays small and does not flicker.

    GIF counts time in hundredths of a second: 16 frames per second play at 16.7.
    """
    palette = Image.fromarray(np.concatenate(list(frames))).quantize(colours)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    duration = max(20, 10 * round(100 / fps))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=duration, loop=0, optimize=True)
