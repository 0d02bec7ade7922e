"""The causal network on disk, in half precision, and compiled."""

import json

import diffusers
import torch
from torch._dynamo.testing import CompileCounter

from anyflow_train.models.far_transformer import AnyFlowFARTransformer3DModel
from tests.models.networks import clean_inputs, far_inputs, small_far


def arguments():
    return far_inputs((1, 2, 1), 3) | clean_inputs(3)


def test_saved_folders_load_in_diffusers_and_back(tmp_path):
    network = small_far(gate_value=0.7)
    network.save_pretrained(tmp_path / "ours")
    stock = diffusers.AnyFlowFARTransformer3DModel.from_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    back = AnyFlowFARTransformer3DModel.from_pretrained(tmp_path / "stock")
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "stock"))
    theirs.pop("_name_or_path")  # it was loaded from a folder
    assert ours == theirs
    given = arguments()
    with torch.no_grad():
        expected = network(**given).sample
        torch.testing.assert_close(stock(**given).sample, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(back(**given).sample, expected)


def test_half_precision_keeps_the_times_in_float32(tmp_path):
    network = small_far()
    network.save_pretrained(tmp_path)
    half = AnyFlowFARTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    embedder = half.condition_embedder
    wide = [*embedder.time_embedder.parameters(), *embedder.delta_embedder.parameters(), half.scale_shift_table]
    assert {weight.dtype for weight in wide} == {torch.float32}
    assert half.far_patch_embedding.weight.dtype == torch.bfloat16
    given = arguments()
    expected = network(**given).sample
    for name in ("hidden_states", "encoder_hidden_states", "clean_hidden_states"):
        given[name] = given[name].bfloat16()
    sample = half(**given).sample
    assert sample.dtype == torch.bfloat16
    # bf16 keeps 8 bits: a few per cent after two layers.
    assert (sample - expected).abs().max() < 0.1 * expected.abs().max()


def test_autocast_leaves_the_time_embedding_in_float32():
    network, given = small_far(), arguments()
    seen = []
    network.condition_embedder.register_forward_hook(lambda module, given, made: seen.append(made))
    with torch.autocast("cpu", torch.bfloat16):
        network(**given)
    network(**given)
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_compiles_whole_and_once():
    """No graph break (fullgraph), and no recompilation when only t and r change."""
    torch._dynamo.reset()
    network, given = small_far(num_layers=1), arguments()
    counter = CompileCounter()
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(**given).sample, network(**given).sample, rtol=1e-5, atol=1e-5)
    for t in (1000.0, 3.25):
        times = torch.full_like(given["timestep"], t)
        compiled(**given | {"timestep": times, "r_timestep": times / 2}).sample.sum().backward()
    assert counter.frame_count == 1
