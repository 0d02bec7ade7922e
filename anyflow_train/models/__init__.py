"""The networks, and how they are loaded."""

from __future__ import annotations

from typing import Any

import anyflow_train

_EXPORTS = ("AnyFlowFARTransformer3DModel", "AnyFlowTransformer3DModel", "load_student", "load_teacher")


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(anyflow_train, name)


def __dir__() -> list[str]:
    return [*globals(), *_EXPORTS]
