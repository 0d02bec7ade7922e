"""Conditioning frames: the first frames of a clip, taken from an image or a video of the user."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from torch import Tensor

from anyflow_train.config.chunks import Chunks
from anyflow_train.data.prepare.video import ClipError, read_clip
from anyflow_train.errors import UserError
from anyflow_train.evaluation.clip_maker import Shape
from anyflow_train.models.codec import Codec


@dataclass(frozen=True)
class ConditioningSource:
    """An image or a video that a clip continues.

    Attributes:
        key: config key that names the file, for errors.
        path: image or video.
        frames: frames of the video to use, 4n + 1; None uses as many as the video has and the network can take.
        fps: rate at which the frames are read, in frames per second.
    """

    key: str
    path: Path
    frames: int | None
    fps: float


def given_latents(source: ConditioningSource, codec: Codec, shape: Shape) -> Tensor:
    """Encode the first frames of a file to clean latents (1, P, C, H, W).

    A causal network takes whole chunks, and at least one chunk must remain to be generated. Other networks take one
    latent frame if `source.frames` is not set.

    Args:
        source: the file.
        codec: encodes the frames.
        shape: shape of a clip, including the conditioning frames.

    Raises:
        UserError: the file cannot be read or is too short, or its frames end inside of a chunk or fill the clip.
    """
    factor, chunks = codec.temporal_factor, shape.chunks
    if source.frames is not None:
        counts = [(source.frames - 1) // factor + 1]
        _check_count(source, counts[0], shape.latent[0], chunks)
    else:
        counts = [1] if chunks is None else list(accumulate(chunks.partition))[-2::-1]
    problem = f"chunks {list(chunks.partition) if chunks else []} leave no chunk for conditioning; use two or more"
    for count in counts:
        try:
            pixels = read_clip(source.path.expanduser(), factor * (count - 1) + 1, *shape.size[1:], source.fps)
        except ClipError as error:
            problem = str(error)
            continue
        return codec.encode_video(pixels[None])
    raise UserError(source.key, f"'{source.path}' is {problem}" if counts else problem)


def _check_count(source: ConditioningSource, count: int, frames: int, chunks: Chunks | None) -> None:
    key = "context_frames" if source.key == "video" else source.key
    if chunks is None:
        if count >= frames:
            latent = f"{source.frames} pixel frames are {count} latent frames"
            raise UserError(key, f"{latent}, and the clip has {frames}; use fewer, so that some are generated")
        return
    try:
        chunks.whole(count)
    except ValueError as error:
        raise UserError(key, f"{source.frames} pixel frames are {count} latent frames, but {error}") from None
