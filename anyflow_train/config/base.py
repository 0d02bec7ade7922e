"""What every config model shares: strict, frozen, every key known."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Model(BaseModel):
    """A config node: unknown keys and silent type conversions are errors; values never change after decoding."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)
