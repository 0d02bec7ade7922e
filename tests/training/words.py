"""Constants of launches and their processes. This module does not import torch, so that processes start faster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
# Layers whose results a process looks at: one that must stay float32, and one that may be rounded.
LAYERS = ("condition_embedder.time_embedder.linear_2", "blocks.0.ffn.net.2")


def words(config: dict[str, Any]) -> list[str]:
    """A config as it is written on the command line."""
    group = f"on_policy={config.get('on_policy', {}).get('kind', 'none')}"
    return ["student/adapter=full", "student.init=null", "teacher.source=null", group, *_overrides(config)]


def _overrides(config: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found += _overrides(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}")
    return found
