"""Networks with random weights."""

import torch

from anyflow_train.models.build import build_network
from tests.models.networks import SMALL


def test_random_networks_follow_from_the_seed_and_disturb_no_other_draw():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_network(SMALL, seed=1)
    assert torch.equal(torch.rand(3), expected)
    again, other = build_network(SMALL, seed=1), build_network(SMALL, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.proj_out.weight, other.proj_out.weight)


def test_damping_bounds_how_fast_a_random_network_turns_in_time():
    """The slope of each feature (amplitude times frequency) is at most that of the fastest undamped one."""
    plain = build_network(SMALL, seed=1).condition_embedder
    damped = build_network(SMALL, seed=1, time_frequency_limit=0.03).condition_embedder
    frequency = 10000.0 ** (-torch.arange(16) / 16).repeat(2)
    for embedder, free in ((damped.time_embedder, plain.time_embedder), (damped.delta_embedder, plain.delta_embedder)):
        share = (embedder.linear_1.weight / free.linear_1.weight).mean(0)
        torch.testing.assert_close(share * frequency, frequency.clamp(max=0.03), rtol=1e-5, atol=0)
        assert torch.equal(embedder.linear_2.weight, free.linear_2.weight)
