"""Where an export comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow_train import __version__
from anyflow_train.config.run import RunConfig

# Places on the machine that trained say nothing to others, and are nobody's business.
_LOCAL: dict[str, Any] = {
    "out": True,
    "tracker": True,
    "teacher": True,
    "student": {"init"},
    "data": {"shards", "cache", "cache_gib", "workers"},
    "evaluation": {"held_out"},
}


@dataclass(frozen=True)
class Provenance:
    """What the marker and the model card say.

    Attributes:
        format, weights, precision, shift: as in `ExportConfig`.
        config: of the run.
        checkpoint: name of the checkpoint's folder.
        step: of the checkpoint.
        base: name of what the student started from; None for random weights.
        difference: relative root mean square between stock diffusers' outputs and the trained model's.
    """

    format: str
    weights: str
    precision: str
    shift: float
    config: RunConfig
    checkpoint: str
    step: int
    base: str | None
    difference: float

    @property
    def version(self) -> str:
        """Of this package."""
        return __version__

    def to_json(self) -> dict[str, Any]:
        """For the marker file: no paths of the machine that trained."""
        facts = ("format", "weights", "precision", "shift", "checkpoint", "step", "base", "difference")
        config = self.config.model_dump(mode="json", exclude=_LOCAL)
        return {"run": self.config.name, **{name: getattr(self, name) for name in facts}, "config": config}


def public_name(source: str | None) -> str | None:
    """A hub id as it is, a local folder by its own name, a checkpoint by its run's and its own."""
    if source is None:
        return None
    path = Path(source).expanduser()
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}, {path.name}"
    return path.resolve().name if path.exists() or path.is_absolute() else source
