"""The frames that a clip begins with, where a user gives an image or a video to go on from."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from torch import Tensor

from anyflow_train.config.chunks import Chunks
from anyflow_train.data.prepare.video import ClipError, read_clip
from anyflow_train.errors import UserError
from anyflow_train.models.codec import Codec


@dataclass(frozen=True)
class ConditioningSource:
    """What is gone on from.

    Attributes:
        key: config key that names the file, for errors.
        path: image or video.
        frames: of the video that are given, 4n + 1; None: as many as it has, and the network can take.
        fps: at which they are taken.
    """

    key: str
    path: Path
    frames: int | None
    fps: float


def given_latents(
    source: ConditioningSource, codec: Codec, frames: int, height: int, width: int, chunks: Chunks | None
) -> Tensor:
    """Clean latents (1, P, C, H, W) of the first frames.

    A causal network takes whole chunks, and one at least is left to generate; any other takes one latent frame, unless
    `source.frames` says more.

    Args:
        frames: latent frames of the clips, the given ones among them.
        height, width: of the clips, in pixels.

    Raises:
        UserError: the file cannot be read or is too short, its frames end inside of a chunk, or leave none to generate.
    """
    factor = codec.temporal_factor
    if source.frames is not None:
        counts = [(source.frames - 1) // factor + 1]
        _check_count(source, counts[0], frames, chunks)
    else:
        counts = [1] if chunks is None else list(accumulate(chunks.partition))[-2::-1]
    problem = f"no chunk of {list(chunks.partition) if chunks else []} can be given"
    for count in counts:
        try:
            pixels = read_clip(source.path.expanduser(), factor * (count - 1) + 1, height, width, source.fps)
        except ClipError as error:
            problem = str(error)
            continue
        return codec.encode_video(pixels[None])
    raise UserError(source.key, f"'{source.path}' is {problem}" if counts else problem)


def _check_count(source: ConditioningSource, count: int, frames: int, chunks: Chunks | None) -> None:
    key = "context_frames" if source.key == "video" else source.key
    if chunks is None:
        if count >= frames:
            raise UserError(key, f"{source.frames} pixel frames are {count} latent ones of {frames}: none is left")
        return
    try:
        chunks.whole(count)
    except ValueError as error:
        raise UserError(key, f"{source.frames} pixel frames are {count} latent ones, but {error}") from None
