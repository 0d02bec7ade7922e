"""Exports load in stock diffusers without this package, and have the outputs of the trained model."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from anyflow_train.config.commands import ExportConfig
from anyflow_train.errors import UserError
from anyflow_train.export import formats, run, verify
from anyflow_train.export.folder import MARKER
from anyflow_train.training.checkpoints.reading import read_network, resolve_checkpoint
from anyflow_train.training.networks import load_trained_network
from anyflow_train.training.weight_source import open_base
from tests.export.runs import CHUNKS, FULL, LORA, TINY_WAN, WITH_DELTA, make_run


def export(trained: Path, out: Path, **options) -> Path:
    run(ExportConfig(model=str(trained), out=str(out), **options))
    return out


def velocity(network, trained: Path, weights: str = "ema") -> tuple[torch.Tensor, torch.Tensor]:
    """Compute outputs of an exported network and of the trained model."""
    model = load_trained_network(trained, weights)
    probe = verify.Probe.of(model.config)
    return verify.flow_map_outputs(network, probe), verify.flow_map_outputs(model, probe)


@pytest.mark.parametrize(("adapter", "deltatime"), [(LORA, "r"), (FULL, "t-r")])
def test_a_pipeline_samples_with_stock_diffusers_alone(tmp_path: Path, adapter: dict, deltatime: str):
    trained = make_run(tmp_path, adapter, deltatime=deltatime)
    out = export(trained, tmp_path / "out", precision="fp32", shift=5.0)
    pipeline = diffusers.AnyFlowPipeline.from_pretrained(out)
    assert pipeline.scheduler.config.shift == 5.0
    assert pipeline.transformer.config.gate_value == 0.25
    assert pipeline.transformer.config.deltatime_type == deltatime
    found, expected = velocity(pipeline.transformer, trained)
    # float32 on both sides, other kernels and another order of the sums.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline("red ball", height=32, width=32, num_frames=5, num_inference_steps=2, output_type="pt").frames
    assert video.shape == (1, 5, 3, 32, 32)
    assert torch.isfinite(video).all()
    for part in ("tokenizer", "text_encoder", "vae"):
        for file in (TINY_WAN / part).iterdir():
            assert (out / part / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("adapter", [FULL, {**LORA, "full_modules": ["far_patch_embedding"]}])
def test_a_causal_pipeline_samples_with_stock_diffusers_alone(tmp_path: Path, adapter: dict):
    trained = make_run(tmp_path, adapter, causal=CHUNKS)
    out = export(trained, tmp_path / "out", precision="fp32")
    pipeline = diffusers.AnyFlowFARPipeline.from_pretrained(out)
    assert pipeline.transformer.config.chunk_partition == [1, 1, 1]
    found, expected = velocity(pipeline.transformer, trained)
    # float32 on both sides, other kernels and another order of the sums.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline("red ball", height=32, width=32, num_frames=9, num_inference_steps=2, output_type="pt").frames
    assert video.shape == (1, 9, 3, 32, 32)
    assert torch.isfinite(video).all()
    assert "AnyFlowFARPipeline.from_pretrained" in (out / "README.md").read_text()


def test_a_causal_network_is_no_wan_pipeline(tmp_path: Path):
    trained = make_run(tmp_path, FULL, gate=0.0, causal=CHUNKS)
    with pytest.raises(UserError, match="cannot contain a causal network"):
        export(trained, tmp_path / "out", format="wan_pipeline")


def test_bf16_keeps_the_time_embedders_in_float32_and_makes_shards(tmp_path: Path):
    trained = make_run(tmp_path, LORA)
    out = export(trained, tmp_path / "out", format="transformer", precision="bf16", max_shard_gib=2e-5)
    assert len(list(out.glob("*.safetensors"))) > 1
    stored = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    kept = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert {"condition_embedder.delta_embedder.linear_1.weight", "scale_shift_table"} <= kept
    assert stored["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    network = diffusers.AnyFlowTransformer3DModel.from_pretrained(out, dtype=torch.bfloat16)
    assert network.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert "lora" not in " ".join(stored)


def test_raw_and_averaged_weights_are_told_apart(tmp_path: Path):
    trained = make_run(tmp_path, FULL)
    outs = {w: export(trained, tmp_path / w, format="transformer", precision="fp32", weights=w) for w in ("ema", "raw")}
    for weights, out in outs.items():
        network = diffusers.AnyFlowTransformer3DModel.from_pretrained(out)
        found, expected = velocity(network, trained, weights)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert json.loads((outs["raw"] / MARKER).read_text())["weights"] == "raw"


def test_a_lora_file_holds_the_second_time_embedder(tmp_path: Path):
    trained = make_run(tmp_path, WITH_DELTA)
    out = export(trained, tmp_path / "out", format="lora", precision="fp32")
    names = load_file(out / "pytorch_lora_weights.safetensors")
    assert "transformer.condition_embedder.delta_embedder.linear_2.lora_A.weight" in names


def test_a_fully_trained_student_becomes_a_lora_file_with_the_error_that_it_makes(tmp_path: Path, capsys):
    """Norms and biases cannot be adapters: at full rank, what is lost is their share of the change."""
    trained = make_run(tmp_path, FULL)
    base = open_base(read_network(resolve_checkpoint(trained)))
    weights = load_trained_network(trained).state_dict()
    change = {name: weight - base.read(name) for name, weight in weights.items()}
    linear = {name for name, weight in change.items() if weight.ndim == 2}
    total = sum(float(part.square().sum()) for part in change.values())
    kept = sum(float(change[name].square().sum()) for name in linear)
    for rank, lost in ((64, (1 - kept / total) ** 0.5), (2, None)):
        out = export(trained, tmp_path / f"rank{rank}", format="lora", precision="fp32", rank=rank)
        marker = json.loads((out / MARKER).read_text())
        spectrum = sum(float(torch.linalg.svdvals(change[name])[rank:].square().sum()) for name in linear)
        exact = (1 - (kept - spectrum) / total) ** 0.5
        assert marker["lost"] == pytest.approx(exact, rel=1e-2)
        assert lost is None or marker["lost"] == pytest.approx(lost, rel=1e-4)
        assert f"lose {marker['lost']:.1%}" in capsys.readouterr().out
        assert f"{marker['lost']:.1%} of what was trained" in (out / "README.md").read_text()


def test_a_lora_file_needs_a_base(tmp_path: Path):
    trained = make_run(tmp_path, FULL, init=None)
    with pytest.raises(UserError, match="format: lora needs a base, but the run started from random weights"):
        export(trained, tmp_path / "out", format="lora")
    assert not (tmp_path / "out").exists()


def test_a_teacher_becomes_a_wan_pipeline(tmp_path: Path):
    trained = make_run(tmp_path, FULL, gate=0.0)
    out = export(trained, tmp_path / "out", format="wan_pipeline", precision="fp16")
    pipeline = diffusers.WanPipeline.from_pretrained(out, dtype=torch.float32)
    model = load_trained_network(trained)
    probe = verify.Probe.of(model.config)
    found = verify.wan_outputs(pipeline.transformer, probe)
    expected = verify.flow_map_outputs(model, probe, verify.AT_ONCE)
    verify.check_outputs("the teacher", found, expected, 1e-2)
    assert pipeline.scheduler.config.shift == 5.0
    pipeline.set_progress_bar_config(disable=True)
    assert (
        pipeline("red", height=32, width=32, num_frames=5, num_inference_steps=1, output_type="latent")
        .frames.isfinite()
        .all()
    )


def test_a_student_is_refused_as_wan_pipeline(tmp_path: Path):
    with pytest.raises(UserError, match=r"student\.gate_value=0"):
        export(make_run(tmp_path, FULL, gate=0.25), tmp_path / "out", format="wan_pipeline")


def test_a_missed_merge_is_noticed_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained = make_run(tmp_path, LORA)
    base = formats.merge_lora
    monkeypatch.setattr(formats, "merge_lora", lambda network: _without_adapters(base, network))
    with pytest.raises(verify.WrongExport, match="LoRA merged"):
        export(trained, tmp_path / "out", format="transformer")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_wrong_shift_in_the_scheduler_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained = make_run(tmp_path, FULL)
    scheduler = formats.FlowMapEulerDiscreteScheduler
    monkeypatch.setattr(formats, "FlowMapEulerDiscreteScheduler", _Named(scheduler))
    with pytest.raises(verify.WrongExport, match="shift"):
        export(trained, tmp_path / "out")


def test_the_marker_tells_where_it_comes_from_and_no_path(tmp_path: Path):
    out = export(make_run(tmp_path, FULL), tmp_path / "out")
    marker = json.loads((out / MARKER).read_text())
    assert (marker["run"], marker["step"], marker["checkpoint"]) == ("run", 7, "step_00000007")
    assert marker["config"]["data"]["frames"] == 5
    assert marker["difference"] < verify.TOLERANCES["bf16"]
    assert str(tmp_path) not in (out / MARKER).read_text() + (out / "README.md").read_text()


def test_a_pipeline_needs_a_codec(tmp_path: Path):
    trained = make_run(tmp_path, FULL)
    with pytest.raises(UserError, match=r"codec: .*no folder 'tokenizer'"):
        export(trained, tmp_path / "out", codec=str(tmp_path / "run"))


def _lose_std(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "latents_std": [float("nan")] * 16}))


@pytest.mark.parametrize("kind", ["pipeline", "wan_pipeline"])
@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tokenizer/tokenizer.json", lambda path: path.write_text("{"), "codec: .*tokenizer.* cannot be loaded"),
        ("text_encoder/config.json", lambda path: path.write_text("3"), "text_encoder/config.json|cannot be loaded"),
        ("vae/config.json", _lose_std, "codec: with this codec, .* not finite"),
        ("vae/diffusion_pytorch_model.safetensors", lambda path: path.write_bytes(b"version https://git-lfs"), "LFS"),
    ],
)
def test_a_codec_that_a_user_could_not_play_is_refused(tmp_path: Path, kind: str, file: str, change, message: str):
    """The whole folder is loaded and plays a clip before it appears."""
    trained = make_run(tmp_path, FULL, gate=0.0 if kind == "wan_pipeline" else 0.25)
    for part in ("tokenizer", "text_encoder", "vae"):
        shutil.copytree(TINY_WAN / part, tmp_path / "codec" / part)
    change(tmp_path / "codec" / file)
    with pytest.raises(UserError, match=message):
        export(trained, tmp_path / "out", codec=str(tmp_path / "codec"), format=kind)
    assert not list(tmp_path.glob("*out*"))


class _Named:
    """Scheduler class that loses the shift, as if it were not set."""

    def __init__(self, scheduler: type) -> None:
        self._scheduler = scheduler
        self.__name__ = scheduler.__name__

    def __call__(self, shift: float):
        return self._scheduler()


def _without_adapters(merge, network):
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            parameter.data.zero_()
    return merge(network)
