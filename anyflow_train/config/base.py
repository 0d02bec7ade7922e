"""Base class of the config models: strict types, frozen values, no unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Model(BaseModel):
    """A config node: unknown keys are errors, and values never change after decoding.

    `config.decode` passes `strict=True` for what users write. Saved configs hold decoded values as JSON and are read
    without it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
