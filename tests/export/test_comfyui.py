"""ComfyUI's files play in Wan2.1's original network, rebuilt from the names of its weights, as the trained student."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from anyflow_train.config.commands import ExportConfig
from anyflow_train.config.network import plain
from anyflow_train.config.original import PREFIX, original_name
from anyflow_train.errors import UserError
from anyflow_train.export import run, verify
from anyflow_train.models.pretrained import open_pretrained
from anyflow_train.training.networks import load_trained_network
from tests.export.original_wan import ComfyModel, WanModel, simple_schedule, with_lora
from tests.export.runs import FULL, LORA, WITH_DELTA, make_run

# ComfyUI takes every head to have 128 channels.
ONE_HEAD: dict[str, Any] = {"num_attention_heads": 1, "attention_head_dim": 128, "rope_max_seq_len": 1024}
EVERYWHERE = {**WITH_DELTA, "targets": [*WITH_DELTA["targets"], "time_embedder.linear_2", "time_proj", "proj_out"]}


def export(folder: Path, adapter: dict, form: str, precision: str = "fp32", **options: Any) -> tuple[Path, Path]:
    trained = make_run(folder, adapter, architecture=ONE_HEAD)
    out = folder / "out"
    run(ExportConfig(model=str(trained), out=str(out), format=form, precision=precision, **options))
    return trained, out


def with_node(weights: dict[str, torch.Tensor], out: Path) -> ComfyModel:
    """Load weights and add the node, imported as ComfyUI does."""
    spec = importlib.util.spec_from_file_location("anyflow_node", out / "custom_nodes" / "anyflow" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    node = module.NODE_CLASS_MAPPINGS["AnyFlowAnyStep"]
    (times,) = node.INPUT_TYPES()["required"]["times"][0]
    (model,) = getattr(node(), node.FUNCTION)(ComfyModel(WanModel(weights)), times)
    return model


def original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {original_name(name): weight.contiguous() for name, weight in state.items()}


@torch.inference_mode()
def check(model: ComfyModel, trained: Path, tolerance: float) -> None:
    """Compare single calls at several (t, r), and a sample of two steps."""
    network = load_trained_network(trained)
    probe = verify.Probe.of(network.config)
    expected = verify.flow_map_outputs(network, probe)
    for row, (t, r) in enumerate(verify.TIMES):
        x, text = probe.latents[row : row + 1].transpose(1, 2), probe.text[row : row + 1]
        found = model.velocity(x, torch.tensor([t]), text, torch.tensor([t, r]))
        verify.check_outputs(f"the call at {t}, {r}", found.transpose(1, 2), expected[row : row + 1], tolerance)
    sampled = model.euler(probe.noise.transpose(1, 2), probe.text[:1], simple_schedule(verify.SAMPLING_STEPS, 5.0))
    verify.check_outputs("a sample", sampled.transpose(1, 2), verify.two_jumps(network, probe, 5.0), tolerance)


@pytest.mark.parametrize("adapter", [FULL, WITH_DELTA])
def test_the_file_plays_every_pair_of_times_with_the_node(tmp_path: Path, adapter: dict) -> None:
    trained, out = export(tmp_path, adapter, "comfyui")
    weights = load_file(out / "run.safetensors")
    assert not [name for name in weights if "delta" in name or "condition_embedder" in name]
    check(with_node(weights, out), trained, 1e-5)


@torch.inference_mode()
def test_without_the_node_the_file_plays_a_single_step(tmp_path: Path) -> None:
    trained, out = export(tmp_path, FULL, "comfyui")
    network = load_trained_network(trained)
    probe, model = verify.Probe.of(network.config), ComfyModel(WanModel(load_file(out / "run.safetensors")))
    times = torch.tensor([t for t, _ in verify.TIMES])
    found = model.velocity(probe.latents.transpose(1, 2), times, probe.text, torch.tensor([1.0, 0.0]))
    expected = verify.flow_map_outputs(network, probe, verify.TO_DATA)
    verify.check_outputs("r = 0", found.transpose(1, 2), expected, 1e-5)
    assert "right only for a single step" in (out / "README.md").read_text()


@pytest.mark.parametrize("adapter", [LORA, EVERYWHERE])
def test_a_lora_file_plays_on_the_original_base_with_the_node(tmp_path: Path, adapter: dict) -> None:
    trained, out = export(tmp_path, adapter, "comfyui_lora")
    base = original(load_file(tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors"))
    check(with_node(with_lora(base, load_file(out / "run.safetensors")), out), trained, 1e-5)
    with safe_open(out / "run.safetensors", framework="pt") as file:
        found = file.metadata()
    assert (found["rank"], found["alpha"], found["base"]) == ("3", "6.0", "base")


def test_a_fully_trained_student_becomes_a_lora_file_for_comfyui(tmp_path: Path) -> None:
    """At full rank the linear layers are those of the student. The time embedding contains the second time."""
    trained, out = export(tmp_path, FULL, "comfyui_lora", rank=512)
    base = original(load_file(tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors"))
    found, student = with_lora(base, load_file(out / "run.safetensors")), load_trained_network(trained).state_dict()
    linear = {original_name(name): w for name, w in student.items() if w.ndim == 2 and "delta" not in name}
    linear["time_embedding.2.weight"] = linear["time_embedding.2.weight"] * 0.75
    for name, weight in linear.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)
    with_node(found, out)
    assert "lose" in (out / "README.md").read_text()


def test_half_precision_stays_near(tmp_path: Path) -> None:
    trained, out = export(tmp_path, FULL, "comfyui", "bf16")
    check(with_node(load_file(out / "run.safetensors"), out), trained, 5e-2)


@pytest.mark.parametrize("steps", range(1, 51))
def test_the_scheduler_simple_gives_our_times(steps: int) -> None:
    ours = torch.linspace(1, 0, steps + 1)
    ours = 5 * ours / (1 + 4 * ours)
    # "simple" takes the times of a table of 1000, which our times lie between if the steps do not divide it.
    torch.testing.assert_close(simple_schedule(steps, 5.0), ours, rtol=0, atol=2e-6 if 1000 % steps == 0 else 5e-3)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "heads of 12 channels"),
        ({"architecture": ONE_HEAD, "deltatime": "t-r"}, "student.deltatime_type=t-r"),
        ({"causal": {"chunk_partition": [1, 1, 1], "full_chunk_limit": 2}, "architecture": ONE_HEAD}, "causal student"),
    ],
)
def test_what_comfyui_cannot_play_is_refused(tmp_path: Path, options: dict, problem: str) -> None:
    trained = make_run(tmp_path, FULL, **options)
    with pytest.raises(UserError, match=f"format: ComfyUI cannot play .*{problem}"):
        run(ExportConfig(model=str(trained), out=str(tmp_path / "out"), format="comfyui"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["file", "prefixed", "repository"])
def test_original_weights_are_read_as_a_folder_of_diffusers_is(tmp_path: Path, layout: str) -> None:
    torch.manual_seed(0)
    shape = {"attention_head_dim": 128, "num_attention_heads": 2, "ffn_dim": 40, "num_layers": 2, "text_dim": 64}
    wan = WanTransformer3DModel(**shape, freq_dim=32)
    wan.save_pretrained(tmp_path / "diffusers")
    prefix = PREFIX if layout == "prefixed" else ""
    weights = {prefix + name: weight for name, weight in original(wan.state_dict()).items()}
    place = tmp_path / "wan.safetensors"
    if layout == "repository":
        place = tmp_path / "repository"
        place.mkdir()
        (place / "config.json").write_text('{"_class_name": "WanModel", "dim": 256}')
    save_file(weights, place if layout != "repository" else place / "diffusion_pytorch_model.safetensors")
    found, expected = open_pretrained(place), open_pretrained(tmp_path / "diffusers")
    assert {name: plain(expected.arguments[name]) for name in found.arguments} == found.arguments
    assert found.tensors.keys() == expected.tensors.keys()
    for name in expected.tensors:
        assert torch.equal(found.read(name), expected.read(name)), name


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ({"blocks.0.attn1.to_q.weight": (2, 2)}, "does not contain a Wan2.1 transformer"),
        ({"img_emb.proj.1.weight": (4, 4)}, "image_dim"),
        ({"blocks.0.ffn.0.scale_weight": (1,)}, r"has the weight blocks\.0\.ffn\.0\.scale_weight"),
    ],
)
def test_other_weights_are_refused_by_name(tmp_path: Path, weights: dict, problem: str) -> None:
    tensors = {}
    if "blocks.0.attn1.to_q.weight" not in weights:
        shape = {"attention_head_dim": 128, "num_attention_heads": 1, "ffn_dim": 8, "num_layers": 1, "text_dim": 8}
        tensors = original(WanTransformer3DModel(**shape, freq_dim=8).state_dict())
    save_file({**tensors, **{name: torch.zeros(shape) for name, shape in weights.items()}}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=problem):
        open_pretrained(tmp_path / "a.safetensors")
