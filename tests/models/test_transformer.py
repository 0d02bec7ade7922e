import json

import diffusers
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from anyflow_train.models.transformer import AnyFlowTransformer3DModel
from tests.models.networks import inputs, small, stock_twin


@pytest.mark.parametrize(
    "changes",
    [{}, {"deltatime_type": "t-r", "gate_value": 0.7}, {"cross_attn_norm": False}, {"patch_size": (1, 1, 1)}],
    ids=["text", "interval time", "no cross norm", "patch 1"],
)
def test_outputs_and_gradients_are_those_of_diffusers(changes):
    network = small(**changes)
    stock = stock_twin(network)
    arguments = inputs()
    for each in (network, stock):
        latents = arguments["hidden_states"].clone().requires_grad_()
        output = each(**arguments | {"hidden_states": latents}).sample
        output.square().sum().backward()
        each.seen = (output.detach(), latents.grad)
    # Both compute in float32, in different order: roundings of a dozen layers on numbers of size one.
    torch.testing.assert_close(network.seen[0], stock.seen[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network.seen[1], stock.seen[1], rtol=1e-4, atol=1e-4)
    gradients = {name: weight.grad for name, weight in stock.named_parameters()}
    for name, weight in network.named_parameters():
        expected = gradients.pop(name)
        assert (weight.grad - expected).abs().max() <= 2e-5 * expected.abs().max(), name
    assert gradients == {}


def test_state_dict_goes_both_ways():
    network = small()
    stock = stock_twin(network)  # strict
    other = small()
    other.load_state_dict(stock.state_dict())
    assert {name: weight.shape for name, weight in network.state_dict().items()} == {
        name: weight.shape for name, weight in stock.state_dict().items()
    }


@pytest.mark.parametrize("gate", [0.25, 0.7])
def test_saved_folders_load_in_diffusers_and_back(tmp_path, gate):
    network = small(gate_value=gate)
    network.save_pretrained(tmp_path / "ours")
    stock = diffusers.AnyFlowTransformer3DModel.from_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    back = AnyFlowTransformer3DModel.from_pretrained(tmp_path / "stock")
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "stock"))
    theirs.pop("_name_or_path")  # it was loaded from a folder
    assert ours == theirs
    assert ours["_class_name"] == "AnyFlowTransformer3DModel"
    with torch.no_grad():
        expected = network(**inputs()).sample
        # The gate is not a weight. If it did not come from the config, the outputs would differ.
        torch.testing.assert_close(stock(**inputs()).sample, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(back(**inputs()).sample, expected)


def test_from_pretrained_keeps_the_same_modules_in_float32_as_diffusers_and_the_delta_embedder(tmp_path):
    small().save_pretrained(tmp_path)
    load = {"pretrained_model_name_or_path": tmp_path, "dtype": torch.bfloat16}
    ours = {n: p.dtype for n, p in AnyFlowTransformer3DModel.from_pretrained(**load).named_parameters()}
    stock = {n: p.dtype for n, p in diffusers.AnyFlowTransformer3DModel.from_pretrained(**load).named_parameters()}
    different = {name for name in ours if ours[name] != stock[name]}
    assert different == {name for name in ours if "delta_embedder" in name}


@pytest.mark.parametrize("class_name", ["WanTransformer3DModel", "AnyFlowFARTransformer3DModel"])
def test_other_networks_are_refused_by_name(tmp_path, class_name):
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": class_name}))
    with pytest.raises(ValueError, match=f"{class_name}.*load_student"):
        AnyFlowTransformer3DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("each", ["timestep", "r_timestep"])
def test_times_may_be_given_once_per_sample_or_once(each):
    network, arguments = small(), inputs()
    batch, frames = arguments["timestep"].shape
    per_sample = {"timestep": torch.tensor([900.0, 500.0, 1.5]), "r_timestep": torch.tensor([100.0, 0.0, 0.5])}
    arguments |= per_sample
    expected = network(**{k: v[:, None].expand(batch, frames) if k in per_sample else v for k, v in arguments.items()})
    torch.testing.assert_close(network(**arguments).sample, expected.sample, rtol=1e-5, atol=1e-5)
    mixed = arguments | {each: per_sample[each][:, None].expand(batch, frames)}
    torch.testing.assert_close(network(**mixed).sample, expected.sample, rtol=1e-5, atol=1e-5)
    once = network(**arguments | {each: torch.tensor(300.0)})
    expected = network(**arguments | {each: torch.full((batch,), 300.0)})
    torch.testing.assert_close(once.sample, expected.sample, rtol=1e-5, atol=1e-5)


def test_modulation_keeps_one_row_per_sample_for_times_per_sample():
    network = small()
    seen = []
    network.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[2].shape))
    arguments = inputs()
    network(**arguments)
    network(**arguments | {"timestep": arguments["timestep"][:, 0], "r_timestep": arguments["r_timestep"][:, 0]})
    network(**arguments | {"timestep": torch.tensor(3.0), "r_timestep": torch.tensor(1.0)})
    assert [tuple(shape[:2]) for shape in seen] == [(3, 3), (3, 1), (1, 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep": torch.zeros(1, 3)}, r"timestep.*\(1, 3\)"),
        ({"r_timestep": torch.zeros(2)}, r"timestep.*\(2,\)"),
        ({"timestep": torch.zeros(3, 1)}, r"timestep.*\(3, 1\)"),
        ({"hidden_states": torch.zeros(3, 3, 4, 5, 8)}, "multiples of the patch"),
        ({"hidden_states": torch.zeros(3, 3, 4, 6, 7)}, "multiples of the patch"),
        ({"hidden_states": torch.zeros(3, 4, 6, 8)}, "hidden_states must be"),
        ({"hidden_states": torch.zeros(3, 3, 5, 6, 8)}, "hidden_states must be"),
        ({"hidden_states": torch.zeros(3, 3, 4, 2, 34)}, "rope_max_seq_len = 16"),
        ({"hidden_states": torch.zeros(3, 17, 4, 2, 2), "timestep": torch.tensor(1.0)}, "rope_max_seq_len = 16"),
        ({"encoder_hidden_states": torch.zeros(3, 5, 19)}, "encoder_hidden_states must be"),
        ({"encoder_hidden_states": torch.zeros(2, 5, 20)}, "encoder_hidden_states must be"),
    ],
)
def test_wrong_calls_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        small()(**inputs() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deltatime_type": "r-t"}, "deltatime_type"),
        ({"patch_size": (2, 2, 2)}, "patch_size"),
        ({"patch_size": (1, 2, 4)}, "patch_size"),
        ({"attention_head_dim": 13}, "attention_head_dim"),
        ({"image_dim": 28}, "image_dim"),
    ],
)
def test_wrong_constructions_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        small(**change)


def test_a_tuple_on_request():
    (sample,) = small()(**inputs(), return_dict=False)
    assert torch.equal(sample, small()(**inputs()).sample)


def test_autocast_leaves_the_time_embedding_in_float32():
    network = small()
    seen = []
    network.condition_embedder.register_forward_hook(lambda module, given, made: seen.append(made))
    with torch.autocast("cpu", torch.bfloat16):
        network(**inputs())
    network(**inputs())
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_bf16_weights_run_and_stay_close():
    network = small()
    expected = network(**inputs()).sample
    arguments = inputs()
    for name in ("hidden_states", "encoder_hidden_states"):
        arguments[name] = arguments[name].bfloat16()
    sample = network.to(torch.bfloat16)(**arguments).sample
    assert sample.dtype == torch.bfloat16
    # bf16 keeps 8 bits: a few per cent after two layers.
    assert (sample - expected).abs().max() < 0.1 * expected.abs().max()


def test_compiles_whole_and_once():
    """No graph break (fullgraph), and no recompilation when only t and r change."""
    torch._dynamo.reset()
    network = small(num_layers=1)
    counter = CompileCounter()
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    arguments = inputs()
    expected = network(**arguments).sample
    torch.testing.assert_close(compiled(**arguments).sample, expected, rtol=1e-5, atol=1e-5)
    for t in (1000.0, 0.0, 3.25):
        times = torch.full_like(arguments["timestep"], t)
        compiled(**arguments | {"timestep": times, "r_timestep": times / 2}).sample.sum().backward()
    assert counter.frame_count == 1


def test_forward_mode_derivative_agrees_with_finite_differences():
    network = small().double()
    arguments = {name: value.double() for name, value in inputs().items()}

    def velocity(latents):
        return network(**arguments | {"hidden_states": latents}).sample

    tangent = torch.randn(arguments["hidden_states"].shape, dtype=torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        derivative = torch.func.jvp(velocity, (arguments["hidden_states"],), (tangent,))[1]
    step = 1e-4
    plus, minus = (velocity(arguments["hidden_states"] + sign * step * tangent) for sign in (1, -1))
    # All in float64: the error of the difference is step^2 times a third derivative of size one to ten.
    torch.testing.assert_close(derivative, (plus - minus) / (2 * step), rtol=0, atol=1e-7)
