"""Base class of the config models: strict types, frozen values, no unknown keys."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError


class Model(BaseModel):
    """A config node: unknown keys are errors, and values never change after decoding.

    `config.decode` passes `strict=True` for what users write. Saved configs hold decoded values as JSON and are read
    without it.

    renamed: earlier names of keys, with their present ones, for the error of an unknown key.
    aliases: other names of keys on the command line, with their own ones.
    """

    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})
    aliases: ClassVar[Mapping[str, str]] = MappingProxyType({})

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Log = Literal["auto", "plain", "json"]
"""How a command talks: a bar on a terminal and lines elsewhere, lines, or JSON."""


class ClipSize(NamedTuple):
    """Number of frames, and height and width in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


def _clip_size(value: object) -> ClipSize:
    parts = value.split("x") if isinstance(value, str) else value
    numbers = [int(part) for part in parts if str(part).isdecimal()] if isinstance(parts, list | tuple) else []
    if not isinstance(parts, list | tuple) or len(parts) != 3 or len(numbers) != 3 or 0 in numbers:
        raise PydanticCustomError("clip_size", "give frames, height and width, such as 17x64x64 or [17,64,64]")
    return ClipSize(*numbers)


_OneSize = Annotated[ClipSize, PlainValidator(_clip_size), PlainSerializer(list)]
Sizes = Annotated[tuple[_OneSize, ...], Field(max_length=36)]
"""List of sizes; more than 36 cannot be stored (see `data.manifest.ShardInfo`)."""
