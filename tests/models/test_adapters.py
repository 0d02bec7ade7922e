import diffusers
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from anyflow_train.config.network import Lora
from anyflow_train.errors import UserError
from anyflow_train.models.adapters import (
    AddedLinear,
    LowRank,
    PassingLinear,
    add_lora,
    lora_state_dict,
    merge_lora,
    trainable_parameters,
)
from tests.models.networks import inputs, small, stock_twin
from tests.models.peft_oracle import add_peft, peft_merged, peft_parameters

TIME_LAYERS = tuple(f"{name}_embedder.linear_{n}" for name in ("time", "delta") for n in (1, 2))


def settings(**changes) -> Lora:
    values = {"kind": "lora", "rank": 3, "alpha": 6.0, "targets": ("attn1.to_q", "ffn.net.0.proj", *TIME_LAYERS)}
    return Lora(**{**values, **changes})


def adapted(**changes):
    network = small()
    add_lora(network, settings(**changes), seed=4)
    return network


def trained(**changes):
    """Build a network with nonzero adapters."""
    network = adapted(**changes)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainable_parameters(network).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return network


@pytest.mark.parametrize("autocast", [False, True], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"targets": ("attn1.to_q",), "full_modules": ("delta_embedder",)}])
def test_they_start_compute_and_learn_as_those_of_peft(changes, autocast):
    """They start bit-equal, so a run that started with peft's adapters can be resumed. Values and gradients differ by
    one rounding: the second product is added as it is computed."""
    network, oracle = adapted(**changes), small()
    add_peft(oracle, settings(**changes), seed=4)
    ours, theirs = trainable_parameters(network), peft_parameters(oracle)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
            theirs[name].copy_(parameter)
    merged = peft_merged(oracle)
    assert all(torch.equal(weight, merged[name]) for name, weight in merge_lora(network).state_dict().items())
    given, dtype, most = inputs(), torch.bfloat16 if autocast else torch.float64, 0.03 if autocast else 1e-12
    if not autocast:
        network, oracle = network.double(), oracle.double()
        given = {name: value.double() for name, value in given.items()}
    ours, theirs = trainable_parameters(network), peft_parameters(oracle)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = network(**given).sample, oracle(**given).sample
    assert found.dtype == dtype
    for output in (found, expected):
        output.double().square().sum().backward()
    pairs = {"output": (found, expected), **{name: (ours[name].grad, theirs[name].grad) for name in ours}}
    for name, (one, other) in pairs.items():
        assert (one - other).norm() <= most * other.norm(), name


def test_the_gradient_of_the_input_is_the_sum_of_both_layers_gradients():
    """The backward pass computes it by one product per layer, and no addition."""
    x, base = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), nn.Linear(4, 3, dtype=torch.float64)
    own = LowRank(PassingLinear(4, 2, bias=False), AddedLinear(2, 3, bias=False), 0.5).double()
    expected = 2 * own(x, base).detach() @ (base.weight + 0.5 * own.lora_B.weight @ own.lora_A.weight)
    loss = own(x, base).square().sum()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        (found,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    names = {event.key for event in profiler.key_averages()}
    assert "aten::addmm_" in names
    assert not names & {"aten::add", "aten::add_"}


def test_adapters_start_at_zero_and_are_all_that_is_trained():
    network = adapted()
    torch.testing.assert_close(network(**inputs()).sample, small()(**inputs()).sample, rtol=0, atol=0)
    names = set(trainable_parameters(network))
    layers = [f"blocks.{n}.{layer}" for n in (0, 1) for layer in ("attn1.to_q", "ffn.net.0.proj")]
    layers += [f"condition_embedder.{layer}" for layer in TIME_LAYERS]
    assert names == {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}


def test_the_default_targets_exist_in_every_block():
    names = trainable_parameters(adapted(targets=Lora(kind="lora").targets))
    assert len(names) == 2 * 6 * 2


def test_adapters_follow_from_the_seed_and_disturb_no_other_draw():
    network = small()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    add_lora(network, settings(), seed=4)
    assert torch.equal(torch.rand(3), expected)
    ours, again = trainable_parameters(network), trainable_parameters(adapted())
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_modules_can_be_trained_whole():
    network = adapted(targets=("attn1.to_q",), full_modules=("time_embedder",))
    whole = {name for name in trainable_parameters(network) if "lora" not in name}
    assert whole == {
        f"condition_embedder.time_embedder.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("attn1.to_z",)}, "targets: the network has no module 'attn1.to_z'"),
        ({"targets": ("to_q", "q")}, "targets: the network has no module 'q'"),
        ({"targets": ("patch_embedding",)}, "patch_embedding' is not a linear layer"),
        ({"full_modules": ("time_embeder",)}, "full_modules: the network has no module 'time_embeder'"),
        ({"full_modules": ("time_embedder",)}, "full_modules: .*time_embedder.linear_1' is also a target"),
    ],
)
def test_wrong_names_are_reported(changes, message):
    with pytest.raises(UserError, match=message):
        adapted(**changes)


def test_dropout_is_refused():
    with pytest.raises(ValueError, match="dropout"):
        settings(dropout=0.1)


@pytest.mark.parametrize("changes", [{}, {"targets": ("attn1.to_q",), "full_modules": ("delta_embedder",)}])
def test_a_merged_network_is_a_plain_one_that_computes_the_same(changes):
    network = trained(**changes)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    merged = merge_lora(network)
    assert list(merged.state_dict()) == list(small().state_dict())
    expected = network(**inputs()).sample
    assert (expected - small()(**inputs()).sample).abs().max() > 0.05
    # One float32 rounding per weight.
    torch.testing.assert_close(merged(**inputs()).sample, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())


def test_merging_a_network_without_adapters_copies_it():
    network = small()
    merged = merge_lora(network)
    assert torch.equal(merged(**inputs()).sample, network(**inputs()).sample)
    assert merged.proj_out.weight.data_ptr() != network.proj_out.weight.data_ptr()


def test_the_merge_is_rounded_once():
    network = trained().to(torch.bfloat16)
    layer = network.blocks[0].attn1.to_q
    own = layer.own["adapter"]
    product = own.lora_B.weight.float() @ own.lora_A.weight.float() * 2
    merged = merge_lora(network).blocks[0].attn1.to_q.weight
    assert torch.equal(merged, (layer.base.weight.float() + product).to(torch.bfloat16))


def test_stock_diffusers_reads_the_lora_file():
    """The case has an alpha that differs from the rank, and an adapter on the delta embedder."""
    network = trained()
    stock = stock_twin(small())
    pipeline = diffusers.AnyFlowPipeline(None, None, stock, None, None)
    pipeline.load_lora_weights(lora_state_dict(network))
    expected = network(**inputs()).sample
    torch.testing.assert_close(stock(**inputs()).sample, expected, rtol=1e-5, atol=1e-5)
    half = stock(**inputs(), attention_kwargs={"scale": 0.5}).sample
    assert (half - expected).abs().max() > 0.01
    # With a LoRA file our network equals that of stock diffusers: `scale` means the same and has no lasting effect.
    ours = small()
    ours.load_lora_adapter({name: factor.clone() for name, factor in lora_state_dict(network).items()})
    torch.testing.assert_close(ours(**inputs(), attention_kwargs={"scale": 0.5}).sample, half, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(**inputs()).sample, expected, rtol=1e-5, atol=1e-5)


def test_a_lora_file_is_refused_where_it_would_lose_something():
    with pytest.raises(ValueError, match="fully trained"):
        lora_state_dict(adapted(targets=("attn1.to_q",), full_modules=("delta_embedder",)))
    with pytest.raises(ValueError, match="no LoRA adapters"):
        lora_state_dict(small().requires_grad_(False))


def test_gradient_checkpointing_trains_the_adapters():
    network = adapted()
    network.enable_gradient_checkpointing()
    network(**inputs()).sample.square().sum().backward()
    assert all(parameter.grad is not None for parameter in trainable_parameters(network).values())
