"""Causal networks from files, from other networks, at random, and with adapters."""

import diffusers
import pytest
import torch
from torch.nn import functional as F

from anyflow_train.config.network import Lora
from anyflow_train.errors import UserError
from anyflow_train.models.adapters import add_lora, merge_lora, trainable_parameters
from anyflow_train.models.build import assemble, build_network
from anyflow_train.models.far_transformer import AnyFlowFARTransformer3DModel
from anyflow_train.models.pretrained import open_pretrained
from tests.models.networks import FAR, SMALL, clean_inputs, far_inputs, small, small_far, small_wan, stock_far_twin


def load(source, gate_value=None, causal=None):
    """Load a network from a source."""
    times = None if gate_value is None else {"gate_value": gate_value, "deltatime_type": "r"}
    weights = open_pretrained(source, times, causal)
    return assemble(weights.arguments, weights.read)


CAUSAL = {**FAR, "compressed_patch_size": (1, 4, 4)}


@pytest.fixture
def wan_folder(tmp_path):
    small_wan().save_pretrained(tmp_path / "transformer")
    return tmp_path


def resized(weight):
    return F.interpolate(weight.flatten(0, 1)[:, None], size=(1, 4, 4), mode="trilinear").view(
        *weight.shape[:2], 1, 4, 4
    )


def assert_far_patch_is_the_other_resized(network):
    patch, far = network.patch_embedding, network.far_patch_embedding
    torch.testing.assert_close(far.weight, resized(patch.weight), rtol=0, atol=1e-6)
    assert torch.equal(far.bias, patch.bias)
    assert far.bias.data_ptr() != patch.bias.data_ptr()


def test_a_causal_student_of_wan_has_its_weights_and_a_resized_patch(wan_folder):
    network = load(wan_folder, 0.5, CAUSAL)
    assert isinstance(network, AnyFlowFARTransformer3DModel)
    assert {name: network.config[name] for name in (*CAUSAL, "gate_value")} == {**CAUSAL, "gate_value": 0.5}
    teacher = small_wan().state_dict()
    for key, weight in network.state_dict().items():
        if not key.startswith("far_"):
            assert torch.equal(weight, teacher[key.replace("delta_embedder", "time_embedder")])
    assert_far_patch_is_the_other_resized(network)


def test_one_chunk_at_equal_times_is_the_teacher(wan_folder):
    student = load(wan_folder, 0.7, CAUSAL)
    given = far_inputs((3,), 3)
    t = torch.tensor([1000.0, 371.25])
    with torch.no_grad():
        expected = small_wan()(given["hidden_states"].transpose(1, 2), t, given["encoder_hidden_states"]).sample
        found = student(**given | {"timestep": t, "r_timestep": t}).sample
    # Same operations in another order, float32, outputs of size one.
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_it_starts_as_diffusers_own_start(wan_folder):
    """diffusers resizes random weights in its constructor, so the test first sets our weights."""
    network = load(wan_folder, causal=CAUSAL)
    stock = stock_far_twin(network)
    given = far_inputs((1, 2, 1), 3) | clean_inputs(3)
    torch.testing.assert_close(stock(**given).sample, network(**given).sample, rtol=1e-5, atol=1e-5)
    fresh = diffusers.AnyFlowFARTransformer3DModel(**SMALL, **CAUSAL)
    assert_far_patch_is_the_other_resized(fresh)


def test_settings_that_are_left_out_are_the_published_ones(wan_folder):
    config = load(wan_folder, causal={}).config
    assert (config["full_chunk_limit"], tuple(config["compressed_patch_size"])) == (3, (1, 4, 4))
    assert config["chunk_partition"] == (1, 3, 3, 3, 3, 3, 3, 2)


def test_a_bidirectional_student_becomes_causal(tmp_path):
    before = small(gate_value=0.5)
    before.save_pretrained(tmp_path)
    network = load(tmp_path, causal=CAUSAL)
    assert network.config["gate_value"] == 0.5
    assert_far_patch_is_the_other_resized(network)
    given = far_inputs((3,), 3)
    found = network(**given).sample
    given.pop("chunk_partition")
    torch.testing.assert_close(found, before(**given).sample, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"gate_value = 0\.5"):
        load(tmp_path, 0.25, causal=CAUSAL)


@pytest.mark.parametrize("place", ["", "transformer"])
def test_a_causal_checkpoint_of_diffusers_stays_itself(tmp_path, place):
    network = small_far()
    with torch.no_grad():
        network.far_patch_embedding.weight.mul_(2)  # simulates training
    stock_far_twin(network).save_pretrained(tmp_path / place)
    for causal in ({}, CAUSAL, {**CAUSAL, "chunk_partition": [1, 2, 1]}):
        loaded = load(tmp_path, causal=causal)
        assert all(torch.equal(x, y) for x, y in zip(loaded.parameters(), network.parameters(), strict=True))
    with pytest.raises(UserError, match="full_chunk_limit = 2"):
        load(tmp_path, causal={"full_chunk_limit": 3})
    # The partition is a property of the clips, so it may differ.
    assert load(tmp_path, causal={"chunk_partition": (1, 3)}).config["chunk_partition"] == (1, 3)
    assert load(tmp_path).config["chunk_partition"] == (1, 2, 1)


def test_another_network_is_refused(tmp_path):
    small_far().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("AnyFlowFARTransformer3DModel", "FluxTransformer2DModel"))
    with pytest.raises(UserError, match="holds a FluxTransformer2DModel"):
        load(tmp_path, causal=CAUSAL)


def test_random_networks_are_those_without_chunks_and_a_resized_patch():
    plain, network = build_network(SMALL, seed=1), build_network({**SMALL, **CAUSAL}, seed=1)
    assert isinstance(network, AnyFlowFARTransformer3DModel)
    weights = network.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in plain.state_dict().items())
    assert_far_patch_is_the_other_resized(network)


def test_adapters_and_the_far_patch_are_trained_and_merged():
    network, given = small_far(), far_inputs((1, 2, 1), 3) | clean_inputs(3)
    settings = Lora(kind="lora", rank=3, alpha=6.0, targets=("attn1.to_q",), full_modules=("far_patch_embedding",))
    add_lora(network, settings, seed=4)
    whole = {name for name in trainable_parameters(network) if "lora" not in name}
    assert whole == {"far_patch_embedding.weight", "far_patch_embedding.bias"}
    torch.testing.assert_close(network(**given).sample, small_far()(**given).sample, rtol=0, atol=0)
    network(**given).sample.square().sum().backward()
    assert all(parameter.grad is not None for parameter in trainable_parameters(network).values())
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainable_parameters(network).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    expected = network(**given).sample
    assert (expected - small_far()(**given).sample).abs().max() > 0.05
    merged = merge_lora(network)
    assert isinstance(merged, AnyFlowFARTransformer3DModel)
    assert list(merged.state_dict()) == list(small_far().state_dict())
    # One float32 rounding per weight.
    torch.testing.assert_close(merged(**given).sample, expected, rtol=1e-5, atol=1e-5)
