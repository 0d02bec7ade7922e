"""Origin of an export: the run, the checkpoint and the settings of the export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow_train import text
from anyflow_train.config.commands import ExportConfig
from anyflow_train.files import read_json
from anyflow_train.training.checkpoints.network_file import NetworkFile

# Paths on the training machine are private, and of no use to others.
_LOCAL: dict[str, tuple[str, ...]] = {
    "student": ("init",),
    "data": ("shards", "cache", "cache_gib", "workers", "generations"),
    "evaluation": ("held_out",),
}
_LOCAL_GROUPS = ("out", "tracker", "teacher", "format")
CONTENT = {"format", "weights", "precision", "shift", "rank", "prompt", "license", "datasets", "push"}
"""Options of an export that change its files and name no path."""


@dataclass(frozen=True)
class Provenance:
    """Facts for the marker file and the model card.

    Attributes:
        options: config of the export.
        network: contents of the checkpoint's `network.json`.
        config: saved config of the run, not decoded, without paths on the training machine.
        checkpoint: name of the checkpoint's folder.
        step: step of the checkpoint.
        base: name of the weights that the student started from; None for random weights.
        difference: relative root mean square difference between stock diffusers' outputs and the trained model's.
        source: folder, hub id or checkpoint of `base`, which may be a path on the training machine.
        lost: share of the trained change that truncated adapters lose, in [0, 1]; None for all other exports.
    """

    options: ExportConfig
    network: NetworkFile
    config: Mapping[str, Any]
    checkpoint: str
    step: int
    base: str | None
    difference: float
    source: str | None = None
    lost: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the facts for the marker file, without paths on the training machine."""
        facts = {name: vars(self)[name] for name in ("checkpoint", "step", "base", "difference", "lost", "config")}
        network = self.network.model_dump(mode="json", include={"run", "sampling"})
        options = self.options.model_dump(mode="json", include=CONTENT)
        return network | options | facts


def public_config(checkpoint: Path) -> dict[str, Any]:
    """Read the saved config of a checkpoint's run, without paths on the training machine."""
    saved = read_json(checkpoint / "config.json")
    kept = {name: value for name, value in saved.items() if name not in _LOCAL_GROUPS}
    for group, names in _LOCAL.items():
        kept[group] = {name: value for name, value in kept.get(group, {}).items() if name not in names}
    return _without_paths(kept)


def _without_paths(value: Any) -> Any:
    """Shorten the paths in other keys, such as those of the fake score, to names."""
    if isinstance(value, dict):
        return {name: _without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return public_name(value) if isinstance(value, str) and "/" in value else value


def public_name(source: str | None) -> str | None:
    """Remove local paths from a source: hub ids stay, folders keep their name, checkpoints also name their run."""
    if source is None:
        return None
    path = Path(source).expanduser()
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}, {path.name}"
    return text.public_name(source)
