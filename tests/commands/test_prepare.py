"""`anyflow prepare prompts=FILE teacher=...`: the teacher makes the clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from anyflow_train.__main__ import main
from anyflow_train.commands.prepare import run
from anyflow_train.config.commands import PrepareConfig
from anyflow_train.data.loader import pad_text
from anyflow_train.data.shards import ShardSet
from anyflow_train.errors import UserError
from anyflow_train.evaluation.load import load_teacher
from anyflow_train.evaluation.sampling import draw_noise
from anyflow_train.flow.types import Condition
from anyflow_train.tiny.clips import write_clips

TINY = str(Path(__file__).resolve().parents[2] / "assets" / "tiny-wan")


def make_config(folder: Path, **changes: Any) -> PrepareConfig:
    keys = {"frames": 5, "height": 32, "width": 32, "samples_per_shard": 2, "precision": "fp32", "device": "cpu"}
    keys |= {"threads": 1, "max_text_length": 8, "negative_prompt": "grey", "steps": 2, "guidance_scale": 3.0}
    places = {"codec": TINY, "teacher": TINY, "prompts": str(folder / "prompts.txt"), "out": str(folder / "out")}
    return PrepareConfig.model_validate({**places, **keys, **changes})


def test_the_teacher_makes_a_clip_for_each_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball\na blue square\na red ball\n")
    run(make_config(tmp_path, batch=2))
    shards = ShardSet.open(str(tmp_path / "out"))
    manifest = shards.manifest
    assert (manifest.kind, manifest.latent_shape, manifest.frames) == ("video", (2, 16, 4, 4), 5)
    samples = [shards.read(index) for index in range(3)]
    assert [sample.caption for sample in samples] == ["a red ball", "a blue square", "a red ball"]
    # Two guided Euler steps with shift 5, by hand: t = 1, 5/6, 0
    network = load_teacher(TINY).flow_map
    negative = Condition(pad_text(shards.texts.negative, 8)[None])
    for sample in samples:
        x, condition = (
            draw_noise(1, (2, 16, 4, 4), 0, f"prepare {sample.key}"),
            Condition(pad_text(sample.text, 8)[None]),
        )
        for t, r in ((1.0, 5 / 6), (5 / 6, 0.0)):
            time = torch.tensor([t])
            with torch.no_grad():
                plain, guided = (network(x, time, time, text) for text in (negative, condition))
            x = x - (t - r) * (plain + 3 * (guided - plain))
        assert sample.latents is not None
        assert torch.allclose(sample.latents, x[0], atol=1e-4)
    assert not torch.equal(samples[0].latents, samples[2].latents)  # pyright: ignore[reportArgumentType]
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("shard-*")}
    (tmp_path / "prompts.txt").write_text("a red ball\na blue square\na red ball\na green ball\n")
    run(make_config(tmp_path, batch=2))
    assert len(ShardSet.open(str(tmp_path / "out"))) == 4
    assert all((tmp_path / "out" / name).read_bytes() == data for name, data in before.items())
    with pytest.raises(UserError, match="steps: was 2 and is now 3"):
        run(make_config(tmp_path, steps=3))
    with pytest.raises(UserError, match=r"guidance_scale: was 3.0 and is now not set"):
        run(make_config(tmp_path, teacher=None))


def test_the_teacher_makes_clips_of_several_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball\n" * 5)
    sizes: dict[str, Any] = {"buckets": ["5x32x32", "1x48x32"], "samples_per_shard": 3}
    alone = make_config(tmp_path, **sizes)
    run(alone)
    assert "5 samples in 2 shards from 5 clips (2 5x32x32, 3 1x48x32)" in capsys.readouterr().out
    run(make_config(tmp_path, **sizes, batch=4, out=str(tmp_path / "together")))
    found, others = (ShardSet.open(str(tmp_path / name)).of_all_sizes() for name in ("out", "together"))
    for one, other in ((found.read(index), others.read(index)) for index in range(5)):
        assert one.latents is not None
        assert other.latents is not None
        assert one.key == other.key
        assert torch.allclose(one.latents, other.latents, atol=1e-4)


def test_a_teacher_needs_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", f"source={tmp_path}", f"teacher={TINY}", f"out={tmp_path / 'out'}"]) == 2
    assert "makes clips from prompts, but prompts is null; give prompts=FILE" in capsys.readouterr().err


def test_a_wrong_teacher_is_said_before_the_texts_are_encoded(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    (tmp_path / "runs" / "stage1" / "checkpoints").mkdir(parents=True)
    inside = f"name a folder inside, such as {tmp_path / 'runs' / 'stage1'}"
    with pytest.raises(UserError, match=inside):
        run(make_config(tmp_path, teacher=str(tmp_path / "runs")))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_only_a_contact_sheet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clips(tmp_path / "clips", 6, seed=1)
    (tmp_path / "clips" / "00004.txt").write_text(" ")
    monkeypatch.setattr("anyflow_train.commands.prepare.PICTURES", 3)  # others take the place of 00004
    config = make_config(tmp_path, prompts=None, teacher=None, source=str(tmp_path / "clips"), dry_run=True)
    run(config)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'out'} would get 6 of 6 clips"
    assert lines[1] == "  6 new: 00000, 00001, 00002, 00003, 00004, ..."
    assert "  00004 cannot be used: empty caption" in lines
    assert lines[-1] == f"contact sheet of 3 clips: {tmp_path / 'out'}.dry_run.png"
    with Image.open(tmp_path / "out.dry_run.png") as sheet:
        assert sheet.width > 4 * 128
    assert not (tmp_path / "out").exists()
