"""Reading a clip as a tensor: frames chosen by presentation time, as a player shows them, in [-1, 1]."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import av.error
import numpy as np
import torch
from av import VideoFrame
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.video.stream import VideoStream
from torch import Tensor
from torch.nn import functional

from anyflow_train.config.base import ClipSize
from anyflow_train.data.prepare.colour import Hdr, sdr_pixels
from anyflow_train.data.prepare.frames import (
    ClipError,
    duration,
    is_picture,
    open_video,
    shown_frames,
    stated_duration,
)
from anyflow_train.data.prepare.windows import Framing, Limits, too_short

# Presentation times are rounded to the container's time base. A frame that is this close (seconds) counts as shown.
TIME_TOLERANCE = 1e-3
# Widths of a pixel that files are believed. Others are mistakes of the file's writer, and its pixels are square.
PIXEL_ASPECTS = (1 / 8, 8)

# PyAV does not know all kinds of data that FFmpeg adds to frames, such as EXIF, and then gives none of a frame's.
# Unknown ones count as a kind that is not used here.
Type._missing_ = classmethod(lambda _type, _value: Type.PANSCAN)  # pyright: ignore[reportAttributeAccessIssue]


def read_clip(source: Path | BinaryIO, frames: int, height: int, width: int, fps: float) -> Tensor:
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

    Returns:
        (3, frames, height, width) float32 in [-1, 1].

    Raises:
        ClipError: the video cannot be read, ends before the last frame, or has a damaged frame or a hole before it.
    """
    return next(read_windows(source, "", Framing((ClipSize(frames, height, width),), fps)))[1]


def read_windows(source: Path | BinaryIO, key: str, framing: Framing) -> Iterator[tuple[str, Tensor]]:
    """Yield the windows of a clip in order, as `read_clip` would read them from a file that begins there.

    The file is decoded once, and each frame is converted once, also if windows overlap.

    Args:
        source: a video or picture, or its bytes.
        key: key of the clip, on which the places of the windows depend.
        framing: what is cut out.

    Yields:
        Key of the sample, and pixels (3, frames, height, width) float32 in [-1, 1].

    Raises:
        ClipError: as `read_clip`, or the clip is outside of the limits; after the windows before the first damaged
            frame or hole.
    """
    try:
        length = _length(source, framing.fps) if framing.needs_length else None
        with open_video(source) as (container, stream):
            known, least = stated_duration(container, stream), framing.limits.seconds
            if known is not None and known < least and not is_picture(container):
                raise ClipError(f"under min_seconds: {known:.2f} s, but min_seconds={least:g}")
            yield from _windows(container, stream, key, framing, length)
    except (av.error.FFmpegError, OSError) as error:  # without the path, as the reason is stored with the shards
        raise ClipError(f"unreadable: {error.strerror or type(error).__name__}") from error
    except (ValueError, IndexError) as error:
        raise ClipError(f"unreadable: {error}") from error


def _windows(
    container: InputContainer, stream: VideoStream, key: str, framing: Framing, length: int | None
) -> Iterator[tuple[str, Tensor]]:
    aspect = float(stream.sample_aspect_ratio or 1)
    size, index, number, end = framing.sizes[0], 0, 0, 0.0
    waiting, begun = deque[int](), list[list[Tensor]]()
    for frame, end in shown_frames(container, stream):
        upright = picture = None
        while index / framing.fps < end - TIME_TOLERANCE:
            if index == 0:
                upright = pixels, wide = _upright(frame, aspect, framing.hdr)
                size = framing.size(pixels.shape[1], pixels.shape[2] * wide, length, is_picture(container))
                waiting.extend(framing.starts(key, size.frames, length))
            if waiting and waiting[0] == index:
                waiting.popleft()
                begun.append([])
            if begun:
                if picture is None:
                    picture = _fitted(*upright or _upright(frame, aspect, framing.hdr), framing.limits, size)
                for window in begun:
                    window.append(picture)
                if len(begun[0]) == size.frames:
                    yield framing.key(key, number), torch.stack(begun.pop(0), dim=1) / 127.5 - 1
                    number += 1
                if not begun and not waiting:
                    return
            index += 1
    if number:
        raise ClipError(f"ends early: at {end:.2f} s, before the end of window {number}")
    raise ClipError(too_short(size.frames, framing.fps, end))


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


def _length(source: Path | BinaryIO, fps: float) -> int:
    """Count the frames of a clip at a rate."""
    with open_video(source) as (container, stream):
        length = 1 if is_picture(container) else math.ceil((duration(container, stream) - TIME_TOLERANCE) * fps)
    if not isinstance(source, Path):
        source.seek(0)
    return length


def _upright(frame: VideoFrame, aspect: float, hdr: Hdr) -> tuple[Tensor, float]:
    """Convert a frame to (3, h, w) in 0..255, turned and mirrored as its display matrix says.

    Returns:
        The pixels, and the width of one divided by its height.
    """
    pixels = sdr_pixels(frame, hdr)
    aspect = aspect if PIXEL_ASPECTS[0] <= aspect <= PIXEL_ASPECTS[1] else 1.0
    if (data := frame.side_data.get("DISPLAYMATRIX")) is not None:
        # A pixel (x, y) is shown at (a x + c y, b x + d y), apart from a shift. Phones store such turned pictures.
        a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
        if abs(b) > abs(a):
            pixels, aspect, (a, d) = pixels.mT, 1 / aspect, (c, b)
        pixels = pixels.flip([axis for axis, sign in ((2, a), (1, d)) if sign < 0])
    return pixels, aspect


def _fitted(pixels: Tensor, aspect: float, limits: Limits, size: ClipSize) -> Tensor:
    """Scale and crop pixels to (3, height, width) float32. Raises ClipError if they are outside of the limits."""
    limits.check(pixels.shape[1], pixels.shape[2] * aspect, size)
    return fit(pixels, size.height, size.width, aspect)
