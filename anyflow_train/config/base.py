"""Base class of the config models: strict types, frozen values, no unknown keys."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


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
