"""The embedded worlds by name: small video data sets that are drawn and recognised in closed form."""

from __future__ import annotations

from types import ModuleType

from anyflow_train.tiny import shapes, stripes

WORLDS: dict[str, ModuleType] = {"stripes": stripes, "shapes": shapes}
"""Each has `draw`, `render`, `draw_clips`, `caption`, `label_of`, `recognise`, `accuracy`, and the constants `CLASSES`
and `WORDS`."""
