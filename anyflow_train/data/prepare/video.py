"""Reading a clip as a tensor: frames chosen by presentation time, as a player shows them, in [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import av.error
import numpy as np
import torch
from av import VideoFrame
from av.container import InputContainer
from av.video.stream import VideoStream
from torch import Tensor
from torch.nn import functional

from anyflow_train.data.prepare.colour import Hdr, sdr_pixels
from anyflow_train.data.prepare.frames import ClipError, open_video, shown_frames

__all__ = ["ClipError", "Limits", "fit", "read_clip"]

# Presentation times are rounded to the container's time base. A frame that is this close (seconds) counts as shown.
TIME_TOLERANCE = 1e-3
# Widths of a pixel that files are believed. Others are mistakes of the file's writer, and its pixels are square.
PIXEL_ASPECTS = (1 / 8, 8)


@dataclass(frozen=True)
class Limits:
    """Which clips are good enough.

    Attributes:
        size: least length of the shorter side in pixels.
        seconds: least duration, as the file states it.
        upscale: largest factor by which pictures may be enlarged; None allows any.
    """

    size: int = 0
    seconds: float = 0.0
    upscale: float | None = None

    def check(self, height: float, width: float, scale: float) -> None:
        """Check the size of a picture as shown, and the scale that the target needs. Raises ClipError."""
        if min(height, width) < self.size:
            raise ClipError(f"smaller than min_size: {width:.0f}x{height:.0f} pixels, but min_size={self.size}")
        if self.upscale is not None and scale > self.upscale:
            needs = f"{width:.0f}x{height:.0f} pixels must be enlarged by {scale:.2f}"
            raise ClipError(f"over max_upscale: {needs}, but max_upscale={self.upscale:g}")


ANY = Limits()


def read_clip(
    source: Path | BinaryIO,
    frames: int,
    height: int,
    width: int,
    fps: float,
    hdr: Hdr = "tonemap",
    limits: Limits = ANY,
) -> Tensor:
    """Read the first frames of a video at a given rate.

    Frame k is the frame that a player shows k / fps seconds after the first one; a slower video repeats frames. Each
    frame is shown upright, with square pixels, without interlacing and in SDR. It is scaled with its aspect ratio until
    it covers the target size, and cropped around its centre.

    Args:
        source: a video file, or its bytes.
        frames: number of frames, 4n + 1 for Wan's VAE.
        height: target height in pixels.
        width: target width in pixels.
        fps: target rate in frames per second.
        hdr: whether HDR is converted, or cannot be used.
        limits: which clips are good enough.

    Returns:
        (3, frames, height, width) float32 in [-1, 1].

    Raises:
        ClipError: the video cannot be read, ends before the last frame, has a damaged frame or a hole before it, or is
            outside of the limits.
    """
    chosen: list[Tensor] = []
    end = 0.0
    try:
        with open_video(source) as (container, stream):
            aspect = float(stream.sample_aspect_ratio or 1)
            if (known := _seconds(container, stream)) is not None and known < limits.seconds:
                raise ClipError(f"under min_seconds: {known:.2f} s, but min_seconds={limits.seconds:g}")
            for frame, end in shown_frames(container, stream):
                pixels = None
                while len(chosen) < frames and len(chosen) / fps < end - TIME_TOLERANCE:
                    pixels = _upright(frame, aspect, height, width, hdr, limits) if pixels is None else pixels
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


def fit(pixels: Tensor, height: int, width: int, aspect: float = 1.0) -> Tensor:
    """Scale a picture until it covers the target, and crop around its centre.

    Args:
        pixels: (3, h, w) in 0..255.
        height: target height.
        width: target width.
        aspect: width of a pixel divided by its height.

    Returns:
        (3, height, width) float32 in 0..255.
    """
    wide = pixels.shape[2] * aspect
    scale = max(height / pixels.shape[1], width / wide)
    size = (max(height, round(pixels.shape[1] * scale)), max(width, round(wide * scale)))
    pixels = pixels.float()
    if size != tuple(pixels.shape[1:]):
        pixels = functional.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0].clamp(0, 255)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[:, top : top + height, left : left + width]


def _seconds(container: InputContainer, stream: VideoStream) -> float | None:
    """Return the duration that the file states; None if it states none."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / av.time_base


def _upright(frame: VideoFrame, aspect: float, height: int, width: int, hdr: Hdr, limits: Limits) -> Tensor:
    """Convert a frame to (3, height, width) float32 in 0..255, turned and mirrored as its display matrix says."""
    pixels = sdr_pixels(frame, hdr)
    aspect = aspect if PIXEL_ASPECTS[0] <= aspect <= PIXEL_ASPECTS[1] else 1.0
    if (data := frame.side_data.get("DISPLAYMATRIX")) is not None:
        # A pixel (x, y) is shown at (a x + c y, b x + d y), apart from a shift. Phones store such turned pictures.
        a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
        if abs(b) > abs(a):
            pixels, aspect, (a, d) = pixels.mT, 1 / aspect, (c, b)
        pixels = pixels.flip([axis for axis, sign in ((2, a), (1, d)) if sign < 0])
    shown = pixels.shape[1], pixels.shape[2] * aspect
    limits.check(*shown, max(height / shown[0], width / shown[1]))
    return fit(pixels, height, width, aspect)
