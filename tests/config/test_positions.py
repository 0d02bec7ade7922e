"""Positions: exact for every number of processes, accumulation and micro-batch that divides."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from anyflow_train.config.positions import (
    Branch,
    BranchCounts,
    branch_counts,
    even_accumulation,
    local_positions,
    rows_with_second_term,
)

LAYOUTS = list(itertools.product((1, 2, 3, 4, 6, 8), (1, 2, 3, 4), (1, 2, 3, 4)))
SHARES = ((0.5, 0.25), (0.5, 0.0), (0.75, 0.1), (0.3, 0.3), (0.0, 1.0), (1.0, 0.0))


def test_every_slot_is_held_once() -> None:
    for layout in LAYOUTS:
        check_every_slot_is_held_once(*layout)


def check_every_slot_is_held_once(world: int, accumulation: int, micro_batch: int) -> None:
    batch = world * accumulation * micro_batch
    held = [local_positions(batch, micro_batch, world, rank) for rank in range(world)]
    assert sorted(position for steps in held for positions in steps for position in positions) == list(range(batch))
    assert all(len(steps) == accumulation and all(len(s) == micro_batch for s in steps) for steps in held)
    for step in range(accumulation):
        together = sorted(position for steps in held for position in steps[step])
        assert together == list(range(step * world * micro_batch, (step + 1) * world * micro_batch))


@pytest.mark.parametrize(("diffusion", "consistency"), SHARES)
def test_branches_are_exact_and_every_process_runs_equally_many_derivatives(
    diffusion: float, consistency: float
) -> None:
    for layout in LAYOUTS:
        check_branches(*layout, diffusion, consistency)


def check_branches(world: int, accumulation: int, micro_batch: int, diffusion: float, consistency: float) -> None:
    batch = world * accumulation * micro_batch
    try:
        counts = branch_counts(batch, diffusion, consistency)
    except ValueError:
        assert batch < 12  # only tiny batches lose a branch at these shares
        return
    held = [local_positions(batch, micro_batch, world, rank) for rank in range(world)]
    branches = [counts.branch(position) for steps in held for positions in steps for position in positions]
    assert [branches.count(b) for b in Branch] == [counts.diffusion, counts.consistency, counts.free]
    for step in range(accumulation):
        rows = {rows_with_second_term(counts, steps[step], world) for steps in held}
        assert len(rows) == 1
        (last,) = rows
        for steps in held:
            needed = [counts.branch(position) != Branch.DIFFUSION for position in steps[step]]
            assert not any(needed[: micro_batch - last])  # every row that needs the derivative gets it
            if counts.diffusion % world == 0:
                assert sum(needed) == last  # and no other does


def test_shares_round_half_up_and_free_takes_the_rest() -> None:
    assert branch_counts(32, 0.5, 0.25) == BranchCounts(16, 8, 8)
    assert branch_counts(5, 0.5, 0.25) == BranchCounts(3, 1, 1)
    assert branch_counts(3, 0.5, 0.5) == BranchCounts(2, 1, 0)


@pytest.mark.parametrize(
    ("batch", "diffusion", "consistency", "message"),
    [
        (2, 0.5, 0.25, "1 diffusion, 1 consistency and 0 free samples, but the shares require free samples"),
        (1, 0.25, 0.25, "the shares require diffusion and consistency samples"),
        (8, 0.7, 0.4, "at most 1 together"),
        (8, -0.1, 0.4, "must be at least 0"),
    ],
)
def test_a_batch_that_cannot_hold_its_branches_is_refused(
    batch: int, diffusion: float, consistency: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        branch_counts(batch, diffusion, consistency)


def test_layouts_that_do_not_divide_are_refused() -> None:
    for arguments in ((10, 4, 1, 0), (8, 2, 3, 0), (8, 0, 1, 0), (8, 2, 2, 2)):
        with pytest.raises(ValueError, match=r"does not divide|is not one of"):
            local_positions(*arguments)
    with pytest.raises(ValueError, match="not one process's share"):
        rows_with_second_term(BranchCounts(4, 2, 2), (0, 1), 2)
    with pytest.raises(ValueError, match="outside a global batch"):
        BranchCounts(4, 2, 2).branch(8)


def test_accumulation_that_wastes_nothing_is_found() -> None:
    assert even_accumulation(micro_batch=2, world=8, diffusion_share=0.5) == 1
    assert even_accumulation(micro_batch=1, world=8, diffusion_share=0.5) == 2
    assert even_accumulation(micro_batch=1, world=64, diffusion_share=0.001) == 1  # no diffusion at all
    assert even_accumulation(micro_batch=1, world=64, diffusion_share=0.013) is None
    # Micro-batch 1 without accumulation: half of the processes hold diffusion only, and run the derivative anyway.
    assert {rows_with_second_term(branch_counts(8, 0.5, 0.25), (position,), 8) for position in range(8)} == {1}


def test_slots_need_no_torch() -> None:
    program = "import sys, anyflow_train.config.positions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
