"""Times: the grid, the shift, the intervals of each branch, and the published rounding."""

from __future__ import annotations

import pytest
import torch

from anyflow_train.config.positions import Branch, branch_counts, local_positions
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.times import (
    TimeDistribution,
    draw_diffusion_time,
    draw_interval,
    round_time,
    sampling_grid,
    shift_time,
)
from tests.flow.oracles import bulk_draw

CPU = torch.device("cpu")


def test_shift_keeps_the_ends_and_composes() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert shift_time(t, 5.0)[[0, -1]].tolist() == [0, 1]
    assert shift_time(0.5, 5.0) == pytest.approx(5 / 6)
    # shift(a) after shift(b) is shift(ab); both sides are a few float64 operations.
    torch.testing.assert_close(shift_time(shift_time(t, 2.0), 3.0), shift_time(t, 6.0), rtol=1e-14, atol=0)


def test_grid_falls_from_noise_to_data() -> None:
    grid = sampling_grid(4, 5.0)
    assert grid == pytest.approx([1, 15 / 16, 5 / 6, 5 / 8, 0])
    with pytest.raises(ValueError, match="at least 1 step"):
        sampling_grid(0, 5.0)


def test_each_branch_gets_its_kind_of_interval() -> None:
    counts = branch_counts(4000, 0.5, 0.25)
    interval = draw_interval(bulk_draw(4000, seed=1), counts, 5.0, "fp32")
    t, r, branch = interval.t, interval.r, interval.branch
    assert torch.equal(t[branch == Branch.DIFFUSION], r[branch == Branch.DIFFUSION])
    assert (r[branch == Branch.CONSISTENCY] == 0).all()
    free = branch == Branch.FREE
    assert ((r < t) & (r > 0) & (t < 1))[free].all()
    assert [int((branch == b).sum()) for b in Branch] == [2000, 1000, 1000]


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_t_is_the_larger_and_r_the_smaller_of_two_shifted_uniforms(
    shift: float,
) -> None:
    counts = branch_counts(40_000, 0.0, 0.0)
    interval = draw_interval(bulk_draw(40_000, seed=2), counts, shift, "fp32")
    # Undo the shift (its inverse is the shift by 1/s); the standard error of the mean is 0.236 / 200.
    t, r = shift_time(interval.t, 1 / shift), shift_time(interval.r, 1 / shift)
    assert t.mean().item() == pytest.approx(2 / 3, abs=0.005)
    assert r.mean().item() == pytest.approx(1 / 3, abs=0.005)


def test_times_do_not_depend_on_how_slots_are_spread() -> None:
    counts = branch_counts(8, 0.5, 0.25)
    whole = draw_interval(Draw(3, 7, tuple(range(8)), CPU), counts, 5.0, "fp32")
    for rank in range(2):
        for positions in local_positions(8, 2, 2, rank):
            part = draw_interval(Draw(3, 7, positions, CPU), counts, 5.0, "fp32")
            index = torch.tensor(positions)
            assert torch.equal(part.t, whole.t[index])
            assert torch.equal(part.r, whole.r[index])
            assert torch.equal(part.branch, whole.branch[index])
            assert part.t.dtype == torch.float32


def test_published_rounding_leaves_a_span_of_8_where_10_was_meant() -> None:
    counts = branch_counts(4000, 0.0, 0.0)
    t = draw_interval(bulk_draw(4000, seed=3), counts, 5.0, "bf16").t
    coarse = t[t > 0.516] * 1000
    assert ((coarse / 4) - (coarse / 4).round()).abs().max() < 1e-9
    later, earlier = round_time(t + 0.005, "bf16"), round_time(t - 0.005, "bf16")
    torch.testing.assert_close((later - earlier)[t > 0.52], torch.full_like(t[t > 0.52], 0.008), rtol=1e-9, atol=0)
    assert torch.equal(round_time(t, "fp32"), t)


def test_rounding_keeps_r_below_t() -> None:
    interval = draw_interval(bulk_draw(4000, seed=4), branch_counts(4000, 0.5, 0.25), 5.0, "bf16")
    assert (interval.r <= interval.t).all()


@pytest.mark.parametrize(("distribution", "quartile"), [("uniform", 0.25), ("logit_normal", 0.3375)])
def test_diffusion_times_have_the_named_distribution(distribution: TimeDistribution, quartile: float) -> None:
    draw = bulk_draw(40_000, seed=5)
    t = shift_time(draw_diffusion_time(draw, distribution, 5.0, "fp32"), 1 / 5.0)
    # Quartiles: uniform 0.25, logit-normal sigmoid(-0.6745) = 0.3375; the standard error is about 0.0022.
    assert t.quantile(0.25).item() == pytest.approx(quartile, abs=0.01)
    assert t.median().item() == pytest.approx(0.5, abs=0.01)
