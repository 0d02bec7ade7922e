"""What every config model shares: strict, frozen, every key known."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Model(BaseModel):
    """A config node: unknown keys are errors, and values never change after decoding.

    Types are strict where users write them: `config.decode` passes `strict=True`. Saved configs, which hold decoded
    values as JSON, are read without it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
