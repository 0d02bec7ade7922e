"""Where an export comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow_train import __version__
from anyflow_train.training.checkpoints.network_file import NetworkFile

# Places on the machine that trained say nothing to others, and are nobody's business.
_LOCAL: dict[str, tuple[str, ...]] = {
    "student": ("init",),
    "data": ("shards", "cache", "cache_gib", "workers"),
    "evaluation": ("held_out",),
}
_LOCAL_GROUPS = ("out", "tracker", "teacher", "format")


@dataclass(frozen=True)
class Provenance:
    """What the marker and the model card say.

    Attributes:
        format, weights, precision, shift: as in `ExportConfig`.
        network: what was trained.
        config: of the run, not decoded, without places on the machine that trained.
        checkpoint: name of the checkpoint's folder.
        step: of the checkpoint.
        base: name of what the student started from; None for random weights.
        difference: relative root mean square between stock diffusers' outputs and the trained model's.
    """

    format: str
    weights: str
    precision: str
    shift: float
    network: NetworkFile
    config: Mapping[str, Any]
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
        sampling = self.network.sampling.model_dump(mode="json")
        stated = {name: getattr(self, name) for name in facts}
        return {"run": self.network.run, **stated, "sampling": sampling, "config": self.config}


def public_config(checkpoint: Path) -> dict[str, Any]:
    """The config of a checkpoint's run as it was saved, without places on the machine that trained."""
    saved = json.loads((checkpoint / "config.json").read_text())
    kept = {name: value for name, value in saved.items() if name not in _LOCAL_GROUPS}
    for group, names in _LOCAL.items():
        kept[group] = {name: value for name, value in kept.get(group, {}).items() if name not in names}
    return kept


def public_name(source: str | None) -> str | None:
    """A hub id as it is, a local folder by its own name, a checkpoint by its run's and its own."""
    if source is None:
        return None
    path = Path(source).expanduser()
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}, {path.name}"
    return path.resolve().name if path.exists() or path.is_absolute() else source
