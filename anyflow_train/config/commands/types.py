"""Types of keys that several commands have."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt

GpuName = Literal["a100-40", "a100-80", "h100-80", "h200-141", "b200-180", "l40s-48", "rtx4090-24", "rtx3090-24"]
StrategyName = Literal["ddp", "zero1", "zero2", "zero3", "zero3_offload"]
HalfWidth = Annotated[float, Field(gt=0, le=0.1)]
# A list, or one value, which becomes a list of one.
OneOrMore = BeforeValidator(
    lambda value: tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str | int) else value
)
Texts = Annotated[tuple[str, ...], OneOrMore]
Port = Annotated[int, Field(ge=0, le=65535)]
Calls = Annotated[tuple[PositiveInt, ...], Field(min_length=1), OneOrMore]
Seeds = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1), OneOrMore]
