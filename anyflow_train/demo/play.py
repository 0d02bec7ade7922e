"""Make clips with a model and its teacher from the same noise, until the user stops it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from anyflow_train.config.commands import DemoConfig
from anyflow_train.config.paths import find_codec
from anyflow_train.data.prepare.frames import ClipError, open_video
from anyflow_train.devices import autocast_dtype, pick_device
from anyflow_train.errors import UserError
from anyflow_train.evaluation.clip_maker import ClipMaker, ClipRequest, Shape, clip_shape
from anyflow_train.evaluation.conditioning_frames import ConditioningSource, given_latents
from anyflow_train.evaluation.load import LoadedNetwork, load_model, load_teacher, on_device
from anyflow_train.evaluation.sampling import Watched, padded_condition
from anyflow_train.evaluation.video import Frames
from anyflow_train.flow.causal import ClipSampler
from anyflow_train.flow.sampler import guided
from anyflow_train.models.codec import Codec

MOST_PIXELS = 8192 * 8192
"""Largest picture of an uploaded file, in pixels: 200 MB when it is decoded."""


class Stopped(Exception):
    """The user stopped the sampling."""


@dataclass(frozen=True)
class Wish:
    """Wish of the user.

    Attributes:
        prompt: the prompt.
        calls: network calls per clip of the model, and of the teacher.
        seeds: seed of the noise of each clip.
        file: image or video that the clips continue; None generates all frames.
    """

    prompt: str
    calls: tuple[int, int]
    seeds: range
    file: Path | None = None


@dataclass(frozen=True)
class Clip:
    """A clip that was made.

    Attributes:
        player: name of the network.
        seed: seed of its noise.
        calls: network calls; of each chunk for a causal network.
        frames: (F, H, W, 3) uint8.
        seconds: time that sampling and decoding took.
    """

    player: str
    seed: int
    calls: int
    frames: Frames
    seconds: float


@dataclass(frozen=True)
class Player:
    """A network that is ready to make clips.

    Attributes:
        name: its label.
        maker: makes the clips.
        continues: whether it can continue an image or a video.
        sampler: its sampler, with the chunks of a clip.
    """

    name: str
    maker: ClipMaker
    continues: bool
    sampler: ClipSampler

    @property
    def chunks(self) -> int:
        """Number of chunks of a clip, each of which takes all calls."""
        return 1 if self.sampler.chunks is None else len(self.sampler.chunks.partition)


@dataclass(frozen=True)
class Stage:
    """Players and codec that make clips together.

    Attributes:
        players: the model, and the teacher if there is one.
        shape: shape of the clips.
        codec: decodes clips, and encodes uploaded files.
        encode: encodes a prompt to an embedding (L, D), and remembers the last prompts.
        fps: frames per second.
    """

    players: tuple[Player, ...]
    shape: Shape
    codec: Codec
    encode: Callable[[str], Tensor]
    fps: float

    def play(self, wish: Wish, before_call: Callable[[Player, int], None]) -> Iterator[Clip]:
        """Make one clip per seed and network.

        Args:
            wish: what to make.
            before_call: called before each network call with the network and the number of the clip. It stops the
                sampling by raising `Stopped`.

        Raises:
            UserError: the uploaded file cannot be used.
        """
        text = self.encode(wish.prompt)
        given = None if wish.file is None else self._given(wish.file)
        for seed in wish.seeds:
            noise = self.shape.noise(seed)
            # Without a teacher there is one player, and its number of calls is not used.
            for player, calls in zip(self.players, wish.calls, strict=False):
                number = seed - wish.seeds.start
                watched = Watched(player.maker.flow_map, lambda _, p=player, n=number: before_call(p, n))
                sampler = partial(player.sampler, conditioning=given if player.continues else None)
                start = time.monotonic()
                frames = replace(player.maker, flow_map=watched, sampler=sampler).make(text, noise, calls)
                yield Clip(player.name, seed, calls, frames, time.monotonic() - start)

    def _given(self, path: Path) -> Tensor:
        check_picture(path)
        try:
            return given_latents(ConditioningSource("file", path, None, self.fps), self.codec, self.shape)
        except UserError as error:  # without the folder of uploads
            raise UserError(error.where, error.problem.replace(str(path), path.name)) from None


def load(config: DemoConfig) -> Stage:
    """Load the model, the teacher if there is one, and the codec.

    Raises:
        UserError: one of them cannot be loaded, or the teacher does not fit the model.
    """
    model = load_model(config.model, config.weights)
    networks = [model] if config.teacher is None else [model, _teacher(config.teacher, model)]
    device, dtype = pick_device(config.device, config.threads), autocast_dtype(config.precision)
    source = config.codec or find_codec(model.codec_source)
    codec = Codec.load(source, device)
    texts = Codec(source, codec.vae, device, dtype or torch.float32)  # the VAE is not used with this dtype
    shape = clip_shape(ClipRequest(config.frames, config.height, config.width, config.chunk_partition), model, codec)

    @lru_cache(maxsize=16)
    def encode(text: str) -> Tensor:
        return texts.encode_text([text], config.text_length)[0].float().cpu()

    negative = padded_condition([encode(config.negative_prompt)], config.text_length, device)

    def player(name: str, network: LoadedNetwork) -> Player:
        scale = 1.0 if network.sampling.any_step else config.guidance_scale
        flow_map = guided(on_device(network.network, device, dtype), negative, scale)
        chunks = None if network.chunks is None else shape.chunks
        sampler: ClipSampler = replace(network.sampler, chunks=chunks)
        maker = ClipMaker(flow_map, sampler, codec, config.text_length, config.shift)
        continues = network.sees_conditioning_frames and (chunks is None or len(chunks.partition) > 1)
        return Player(name, maker, continues, sampler)

    names = [network.name for network in networks]
    names[1:] = [f"{name} (teacher)" for name in names[1:]]
    return Stage(tuple(map(player, names, networks)), shape, codec, encode, config.fps)


def check_picture(path: Path) -> None:
    """Check an uploaded file before its pictures are decoded.

    Raises:
        UserError: it is not a video or an image, or its pictures are too large.
    """
    try:
        with open_video(path) as (_, stream):
            pixels = stream.width * stream.height
    except (ClipError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error  # without the folder of uploads
        raise UserError("file", f"cannot be read as an image or a video ({reason})") from None
    if not 0 < pixels <= MOST_PIXELS:
        raise UserError("file", f"its pictures have {pixels} pixels; {MOST_PIXELS} is the most")


def _teacher(source: str, model: LoadedNetwork) -> LoadedNetwork:
    teacher = load_teacher(source)
    if teacher.chunks is not None:
        raise UserError("teacher", f"{source} is a causal student; name a network that is not causal")
    for key in ("in_channels", "text_dim"):
        ours, theirs = model.network.config[key], teacher.network.config[key]
        if ours != theirs:
            raise UserError(
                "teacher", f"{source} has {key}={theirs}, but {model.name} has {ours}; name its own teacher"
            )
    return teacher
