"""Windows of a clip: the parts of it that become samples, and their size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyflow_train.config.base import ClipSize
from anyflow_train.config.commands import PrepareConfig
from anyflow_train.data.prepare.colour import Hdr
from anyflow_train.data.prepare.frames import ClipError
from anyflow_train.flow.draw import draw_key

# Number of bits of `draw_key`.
KEY_BITS = 63
# Begins the number of a window in a sample's key. Keys of clips do not contain it (see `sources.path_key`).
MARK = "@w"


@dataclass(frozen=True)
class Limits:
    """Least quality of clips.

    Attributes:
        size: least pixels of the shorter side.
        seconds: least duration, as the file states it.
        upscale: largest factor by which pictures may be enlarged; None allows any.
    """

    size: int = 0
    seconds: float = 0.0
    upscale: float | None = None

    def check(self, height: float, width: float, size: ClipSize) -> None:
        """Check the size of a picture as shown, and the scale that the target needs. Raises ClipError."""
        if min(height, width) < self.size:
            raise ClipError(f"smaller than min_size: {width:.0f}x{height:.0f} pixels, but min_size={self.size}")
        if self.upscale is not None and (scale := _scale(size, height, width)) > self.upscale:
            needs = f"{width:.0f}x{height:.0f} pixels must be enlarged by {scale:.2f}"
            raise ClipError(f"over max_upscale: {needs}, but max_upscale={self.upscale:g}")


@dataclass(frozen=True)
class Framing:
    """Settings by which samples are cut out of a clip.

    Attributes:
        sizes: sizes of the samples; a clip gets one of them.
        fps: frame rate of the samples.
        windows: see `PrepareConfig.windows`.
        hdr: whether HDR is converted, or cannot be used.
        limits: least quality of clips.
    """

    sizes: tuple[ClipSize, ...]
    fps: float
    windows: str = "first"
    hdr: Hdr = "tonemap"
    limits: Limits = Limits()

    @classmethod
    def of(cls, config: PrepareConfig) -> Framing:
        """Return the framing that a config asks for."""
        limits = Limits(config.min_size, config.min_seconds, config.max_upscale)
        return cls(config.sizes, config.fps, config.windows, config.hdr, limits)

    def key(self, clip: str, number: int) -> str:
        """Return the key of the sample of a window."""
        return clip if self.windows == "first" else window_key(clip, number)

    @property
    def needs_length(self) -> bool:
        """Whether the windows, or the choice of the size, depend on how long a clip is."""
        return self.windows != "first" or len({size.frames for size in self.sizes}) > 1

    def size(self, height: float, width: float, length: int | None, is_picture: bool) -> ClipSize:
        """Choose the size of a clip's samples, such that the least of the clip is cropped.

        Pictures get sizes of one frame; videos get other sizes if there are any. Sizes of more frames than the clip has
        are left out, and so are those that would enlarge it too much. Of sizes that crop equally, the one
        with the most frames is chosen, and then the one with the most pixels.

        Args:
            height: height of the clip as shown.
            width: width of the clip as shown.
            length: number of frames of the clip, at `fps`; None if it is not needed.
            is_picture: whether the clip is a picture.

        Raises:
            ClipError: the clip is too short.
        """
        moving = [size for size in self.sizes if size.frames > 1 and not is_picture]
        sizes = moving or [size for size in self.sizes if size.frames == 1 or not is_picture]
        fitting = [size for size in sizes if length is None or size.frames <= length]
        if not fitting:
            least = min(size.frames for size in sizes or self.sizes)
            raise ClipError(too_short(least, self.fps, (length or 0) / self.fps))
        limit = self.limits.upscale
        small = [size for size in fitting if limit is None or _scale(size, height, width) <= limit]

        def rank(size: ClipSize) -> tuple[float, int, int]:
            ratio = (width / height) / (size.width / size.height)
            return min(ratio, 1 / ratio), size.frames, size.height * size.width

        return max(small or fitting, key=rank)

    def starts(self, key: str, frames: int, length: int | None) -> Sequence[int]:
        """Return the first frames of a clip's windows. They depend on its key, and not on other clips.

        Args:
            key: key of the clip.
            frames: number of frames of a window.
            length: number of frames of the clip, at `fps`; None if it is not needed.
        """
        if self.windows == "first" or length is None:
            return (0,)
        room, drawn = length - frames, draw_key(key, "windows")
        if self.windows.isdecimal():
            count = min(int(self.windows), room + 1)  # of equal parts of all possible starts, at one place in each
            return [((number << KEY_BITS) + drawn) * (room + 1) // (count << KEY_BITS) for number in range(count)]
        step = frames if self.windows == "all" else max(1, round(float(self.windows[:-1]) * self.fps))
        first = drawn * (room % step + 1) >> KEY_BITS
        return range(first, room + 1, step)


def clip_of(key: str) -> str:
    """Return the key of the clip that a sample's key names."""
    return key.partition(MARK)[0]


def window_key(clip: str, number: int) -> str:
    """Return the key of a window's sample."""
    return f"{clip}{MARK}{number:02d}"


def too_short(frames: int, fps: float, seconds: float) -> str:
    """Say that a clip that lasts some seconds has fewer than `frames` frames."""
    needs = f"{frames} frames at {fps:g} fps need more than {(frames - 1) / fps:.2f} s"
    return f"too short: it lasts {seconds:.2f} s, but {needs}"


def _scale(size: ClipSize, height: float, width: float) -> float:
    return max(size.height / height, size.width / width)
