"""Reading a clip as a tensor: frames chosen by presentation time, resized, cropped, in [-1, 1]."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import av
import av.error
import torch
from torch import Tensor
from torch.nn import functional

# Presentation times are rounded to the container's time base. A frame that is this close (seconds) counts as shown.
TIME_TOLERANCE = 1e-3

# A file may be a list of addresses (HLS, concat). Only formats that hold their own pictures are read, from files alone.
OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,hevc,"
    "image2,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe",
    "protocol_whitelist": "file",
}


class ClipError(Exception):
    """A clip cannot be used. The message is the reason."""


def read_clip(source: Path | BinaryIO, frames: int, height: int, width: int, fps: float) -> Tensor:
    """Read the first frames of a video at a given rate.

    Frame k is the frame that a player shows k / fps seconds after the first one; a slower video repeats frames. Each
    frame is scaled with its aspect ratio until it covers the target size, and cropped around its centre.

    Args:
        source: a video file, or its bytes.
        frames: number of frames, 4n + 1 for Wan's VAE.
        height: target height in pixels.
        width: target width in pixels.
        fps: target rate in frames per second.

    Returns:
        (3, frames, height, width) float32 in [-1, 1].

    Raises:
        ClipError: the video cannot be read, or ends before the last frame.
    """
    chosen: list[Tensor] = []
    end = 0.0
    try:
        for frame, end in _shown_frames(source):
            pixels = None
            while len(chosen) < frames and len(chosen) / fps < end - TIME_TOLERANCE:
                pixels = fit(_pixels(frame), height, width) if pixels is None else pixels
                chosen.append(pixels)
            if len(chosen) == frames:
                return torch.stack(chosen, dim=1) / 127.5 - 1
    except (av.error.FFmpegError, OSError) as error:  # without the path, as the reason is stored with the shards
        raise ClipError(f"unreadable: {error.strerror or type(error).__name__}") from error
    except (ValueError, IndexError) as error:
        raise ClipError(f"unreadable: {error}") from error
    needed = (frames - 1) / fps
    needs = f"{frames} frames at {fps:g} fps need more than {needed:.2f} s"
    raise ClipError(f"too short: it lasts {end:.2f} s, but {needs}")


def fit(pixels: Tensor, height: int, width: int) -> Tensor:
    """Scale a picture (3, h, w) in 0..255 until it covers the target, and crop around its centre. Returns float32."""
    scale = max(height / pixels.shape[1], width / pixels.shape[2])
    size = (max(height, round(pixels.shape[1] * scale)), max(width, round(pixels.shape[2] * scale)))
    pixels = pixels.float()
    if size != tuple(pixels.shape[1:]):
        pixels = functional.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0].clamp(0, 255)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[:, top : top + height, left : left + width]


def _shown_frames(source: Path | BinaryIO) -> Iterator[tuple[av.VideoFrame, float]]:
    """Yield each frame with the time (seconds after the first frame) until which a player shows it."""
    # With `file:` a name like `http:/host/a.mp4` is a file's name, and not an address that FFmpeg opens.
    name = f"file:{source}" if isinstance(source, Path) else source
    with av.open(name, "r", options=OPTIONS) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or 0) or 25.0
        previous: av.VideoFrame | None = None
        first = time = 0.0
        for number, frame in enumerate(container.decode(stream)):
            now = number / rate if frame.time is None else frame.time
            if previous is None:
                first = now
            else:
                yield previous, now - first
            previous, time = frame, now
        if previous is not None:
            last = float(previous.duration * previous.time_base) if previous.duration and previous.time_base else 0
            yield previous, time - first + (last or 1 / rate)


def _pixels(frame: av.VideoFrame) -> Tensor:
    """Convert a frame to (3, h, w) uint8, upright. Phones store rotated pictures and the angle in degrees."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).movedim(2, 0)
    return torch.rot90(pixels, round(frame.rotation / 90), (1, 2))
