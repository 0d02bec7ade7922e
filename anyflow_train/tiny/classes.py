"""What the embedded worlds share: classes, their numbers and captions, colours, directions, and the size of a clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

DIRECTIONS = ("left", "right", "up", "down")
COLOURS = ("red", "green", "blue")
MOTION = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))  # (x, y) of each direction, y grows downwards
RGB = ((0.95, 0.28, 0.25), (0.22, 0.82, 0.45), (0.25, 0.50, 0.98))  # of each colour, in [0, 1]
BACKGROUND = (0.07, 0.07, 0.11)  # in [0, 1]

FRAMES = 17
SIZE = 64
FRAMES_PER_SECOND = 16

Label = TypeVar("Label", int, Tensor)


@dataclass(frozen=True)
class Classes:
    """The classes of a world: each combination of a direction, a kind (such as a shape) and a colour.

    Attributes:
        kinds: names of the kinds.
        template: caption with `{colour}`, `{kind}` and `{direction}`.
    """

    kinds: tuple[str, ...]
    template: str

    def __len__(self) -> int:
        return len(DIRECTIONS) * len(self.kinds) * len(COLOURS)

    def join(self, direction: Label, kind: Label, colour: Label) -> Label:
        """Return class numbers. The direction runs fastest, the colour slowest."""
        return direction + len(DIRECTIONS) * (kind + len(self.kinds) * colour)

    def split(self, labels: Label) -> tuple[Label, Label, Label]:
        """Convert class numbers to (direction, kind, colour), the inverse of `join`."""
        rest = labels // len(DIRECTIONS)
        return labels % len(DIRECTIONS), rest % len(self.kinds), rest // len(self.kinds)

    def caption(self, label: int) -> str:
        """Return the prompt of a class. Raises ValueError if there is no class with this number."""
        if not 0 <= label < len(self):
            raise ValueError(f"label {label} is not in [0, {len(self)})")
        direction, kind, colour = self.split(label)
        return self.template.format(colour=COLOURS[colour], kind=self.kinds[kind], direction=DIRECTIONS[direction])

    def label_of(self, caption: str) -> int:
        """Return the class number of a prompt that `caption` wrote. Raises ValueError for any other text."""
        for label in range(len(self)):
            if self.caption(label) == caption:
                return label
        raise ValueError(f"{caption!r} is not a caption of this world")

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw class numbers (count,) int64. Each round holds each class once, in a drawn order."""
        rounds = -(-count // len(self))
        return torch.rand(rounds, len(self), generator=generator).argsort(1).flatten()[:count]


def paint(colour: Tensor, mask: Tensor) -> Tensor:
    """Paint clips of one colour each over the background.

    Args:
        colour: (B,) int64 indices into `COLOURS`.
        mask: (B, F, H, W) in [0, 1], opacity of the colour.

    Returns:
        (B, 3, F, H, W) float32 in [-1, 1].
    """
    mask = mask[:, None]
    tint = torch.tensor(RGB)[colour][:, :, None, None, None]
    background = torch.tensor(BACKGROUND)[None, :, None, None, None]
    return 2 * (background * (1 - mask) + tint * mask) - 1
