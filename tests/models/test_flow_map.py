import pytest
import torch

from anyflow_train.flow.types import Condition
from anyflow_train.models.flow_map import NetworkFlowMap
from tests.models.networks import inputs, small

TIMES = {"t": torch.tensor([0.123456789, 0.5, 1.0]), "r": torch.tensor([0.01234567, 0.25, 0.0])}


def given(**network):
    arguments = inputs()
    return small(**network), arguments["hidden_states"], Condition(arguments["encoder_hidden_states"])


def test_times_are_a_thousand_times_larger_for_the_network():
    network, x, condition = given()
    expected = network(x, 1000 * TIMES["t"], 1000 * TIMES["r"], condition.text).sample
    assert torch.equal(NetworkFlowMap(network, None)(x, **TIMES, condition=condition), expected)
    per_frame = {name: times[:, None].expand(3, 3) for name, times in TIMES.items()}
    velocity = NetworkFlowMap(network, None)(x, **per_frame, condition=condition)
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_times_stay_float32_whatever_the_network_computes_in(dtype, autocast):
    network, x, condition = given()
    network.to(dtype)
    seen = []
    network.condition_embedder.timesteps_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    velocity = NetworkFlowMap(network, autocast)(x, **TIMES, condition=condition)
    assert velocity.dtype == torch.float32
    assert [times.dtype for times in seen] == [torch.float32, torch.float32]
    assert torch.equal(seen[0], 1000 * TIMES["t"])
    assert torch.equal(seen[1], 1000 * TIMES["r"])


def test_no_autocast_means_full_precision_inside_of_autocast_too():
    network, x, condition = given()
    expected = NetworkFlowMap(network, None)(x, **TIMES, condition=condition)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(NetworkFlowMap(network, None)(x, **TIMES, condition=condition), expected)
