import json

import diffusers
import pytest
import safetensors.torch
import torch

from anyflow_train.errors import UserError
from anyflow_train.export.weights import to_wan
from anyflow_train.flow.types import Condition
from anyflow_train.models.build import assemble
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.models.pretrained import open_pretrained
from anyflow_train.models.transformer import AnyFlowTransformer3DModel
from tests.models.networks import TINY_WAN, inputs, small, small_wan


@pytest.fixture
def wan_folder(tmp_path):
    """Save a pipeline folder that only contains the transformer."""
    small_wan().save_pretrained(tmp_path / "wan" / "transformer")
    (tmp_path / "wan" / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return tmp_path / "wan"


def load(source, gate_value=None, deltatime_type="r"):
    """Load a network from a source."""
    times = None if gate_value is None else {"gate_value": gate_value, "deltatime_type": deltatime_type}
    weights = open_pretrained(source, times)
    return assemble(weights.arguments, weights.read)


def change_weights(folder, change):
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    change(weights)
    safetensors.torch.save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(("deltatime_type", "gate"), [("r", 0.0), ("r", 0.25), ("r", 1.0), ("t-r", 0.0)])
def test_a_student_is_its_teacher_at_equal_times(wan_folder, deltatime_type, gate):
    """At initialisation, the student equals Wan2.1 at r = t."""
    teacher = diffusers.WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    student = load(wan_folder, gate, deltatime_type)
    arguments = inputs()
    t = torch.tensor([1000.0, 371.25, 2.0])
    latents, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    with torch.no_grad():
        expected = teacher(latents.transpose(1, 2), t, text).sample.transpose(1, 2)
        found = NetworkFlowMap(student, None)(latents, t / 1000, t / 1000, Condition(text))
    # Same operations in another order, float32, outputs of size one.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_interval_time_with_a_gate_is_not_the_teacher(wan_folder):
    """Shows that the test above would detect an unused gate or second time."""
    teacher_like = load(wan_folder, 0.0, "t-r")
    other = load(wan_folder, 0.25, "t-r")
    arguments = inputs() | {"timestep": torch.tensor(700.0), "r_timestep": torch.tensor(700.0)}
    assert (teacher_like(**arguments).sample - other(**arguments).sample).abs().max() > 1e-3


def test_every_weight_is_the_teachers_and_in_memory(wan_folder):
    teacher = small_wan().state_dict()
    student = load(wan_folder).state_dict()
    for key, weight in student.items():
        assert weight.device.type == "cpu"
        assert torch.equal(weight, teacher.pop(key.replace("delta_embedder", "time_embedder"), weight))
    assert teacher == {}
    assert {key for key in student if "delta_embedder" in key} == {
        f"condition_embedder.delta_embedder.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")
    }
    assert not any(tensor.is_meta for tensor in load(wan_folder).buffers())


def test_the_two_time_embedders_do_not_share_memory(wan_folder):
    embedder = load(wan_folder).condition_embedder
    assert embedder.time_embedder.linear_1.weight.data_ptr() != embedder.delta_embedder.linear_1.weight.data_ptr()


@pytest.mark.parametrize("place", ["", "transformer"])
def test_pipeline_and_transformer_folders_of_wan_load(wan_folder, place):
    network = load(wan_folder / place, 0.5, "t-r")
    assert (network.config["gate_value"], network.config["deltatime_type"]) == (0.5, "t-r")
    assert load(wan_folder / place).config["gate_value"] == 0.25


@pytest.mark.parametrize("place", ["", "transformer"])
def test_pipeline_and_transformer_folders_of_anyflow_load_with_their_own_times(tmp_path, place):
    network = small(gate_value=0.5)
    stock = diffusers.AnyFlowTransformer3DModel.from_config(network.config)
    stock.load_state_dict(network.state_dict())
    stock.save_pretrained(tmp_path / place)
    loaded = load(tmp_path)
    assert torch.equal(loaded(**inputs()).sample, network(**inputs()).sample)
    assert load(tmp_path, 0.5, "r").config["gate_value"] == 0.5
    with pytest.raises(UserError, match=r"gate_value = 0\.5"):
        load(tmp_path, 0.25, "r")
    with pytest.raises(UserError, match="deltatime_type = 'r'"):
        load(tmp_path, 0.5, "t-r")


def test_image_to_video_checkpoints_are_refused_with_the_reason(tmp_path):
    small_wan(image_dim=28, added_kv_proj_dim=24).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="text-to-video"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("blocks.1.attn2.to_k.bias"), "has no weight blocks.1.attn2.to_k.bias"),
        (lambda weights: weights.update(more=torch.zeros(2)), "has the weight more, which the network does not have"),
    ],
)
def test_every_key_is_accounted_for(wan_folder, change, message):
    change_weights(wan_folder / "transformer", change)
    with pytest.raises(UserError, match=message):
        load(wan_folder)


def test_a_missing_key_of_an_anyflow_checkpoint_is_named(tmp_path):
    small().save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop("condition_embedder.delta_embedder.linear_1.bias"))
    with pytest.raises(UserError, match=r"has no weight .*delta_embedder\.linear_1\.bias"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "contains neither"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot read its config"),
        (lambda folder: (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}'), "holds a UNet2DModel"),
    ],
)
def test_folders_that_hold_no_such_network_are_named(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_folder_that_is_not_there_is_not_taken_for_a_hub_id(tmp_path):
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        load(tmp_path / "nowhere")


def test_half_precision_keeps_the_time_embedders_in_float32(tmp_path):
    small().save_pretrained(tmp_path)
    network = AnyFlowTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for embedder in (network.condition_embedder.time_embedder, network.condition_embedder.delta_embedder):
        assert {weight.dtype for weight in embedder.parameters()} == {torch.float32}
    assert network.proj_out.weight.dtype == torch.bfloat16


def test_a_teacher_that_was_trained_here_goes_back_to_wan(wan_folder):
    network = load(wan_folder, 0.0)
    wan = to_wan(network)
    arguments = inputs()
    t = torch.tensor([900.0, 500.0, 1.0])
    with torch.no_grad():
        expected = network(**arguments | {"timestep": t, "r_timestep": t}).sample
        found = wan(arguments["hidden_states"].transpose(1, 2), t, arguments["encoder_hidden_states"]).sample
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"gate_value is 0\.25"):
        to_wan(load(wan_folder))


def test_the_embedded_teacher_is_the_pipelines(tmp_path):
    student = load(TINY_WAN)
    teacher = diffusers.WanTransformer3DModel.from_pretrained(TINY_WAN, subfolder="transformer", dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 5, 16, 8, 8, generator=draw), torch.randn(2, 16, 64, generator=draw)
    t = torch.tensor([0.9, 0.3])
    with torch.no_grad():
        expected = teacher(latents.transpose(1, 2), 1000 * t, text).sample.transpose(1, 2)
        torch.testing.assert_close(
            NetworkFlowMap(student, None)(latents, t, t, Condition(text)), expected, rtol=1e-4, atol=1e-4
        )
