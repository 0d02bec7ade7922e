"""Random numbers are a function of (seed, step, position, purpose)."""

from __future__ import annotations

import torch

from anyflow_train.flow.draw import Draw, draw_key

CPU = torch.device("cpu")


def test_a_slot_s_numbers_do_not_depend_on_its_neighbours() -> None:
    whole = Draw(1, 2, (0, 1, 2, 3), CPU)
    part = Draw(1, 2, (3, 1), CPU)
    assert torch.equal(part.normal("noise", (2, 3)), whole.normal("noise", (2, 3))[[3, 1]])
    assert torch.equal(part.uniform("times", 2), whole.uniform("times", 2)[[3, 1]])


def test_seed_step_slot_and_purpose_each_matter() -> None:
    draws = [Draw(1, 2, (0,), CPU), Draw(9, 2, (0,), CPU), Draw(1, 3, (0,), CPU), Draw(1, 2, (1,), CPU)]
    numbers = [d.normal("noise", (4,)) for d in draws] + [draws[0].normal("other", (4,))]
    assert len({tuple(n.flatten().tolist()) for n in numbers}) == len(numbers)


def test_keys_are_pinned() -> None:
    """A change of this value would change every resumed run."""
    assert draw_key(0, 0, 0, "noise") == 5777082723615645222
