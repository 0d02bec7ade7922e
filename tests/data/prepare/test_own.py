"""Shards from latents that exist already."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anyflow_train.config.commands import PrepareConfig
from anyflow_train.data.manifest import CodecInfo, PromptTexts
from anyflow_train.data.prepare.command import run
from anyflow_train.data.prepare.own import read_cached, write_folder
from anyflow_train.data.shards import Sample, ShardSet
from anyflow_train.data.tar import TarWriter
from anyflow_train.errors import UserError
from anyflow_train.models.codec import Codec

ROOT = Path(__file__).resolve().parents[3]
TINY = str(ROOT / "assets" / "tiny-wan")
SHAPE = (16, 2, 4, 4)
LATENTS = torch.linspace(-1, 1, 512).view(SHAPE)
TEXT = torch.cat([torch.ones(3, 64), torch.zeros(5, 64)])


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def write_rcm(path: Path, latents: Tensor, embed: object = TEXT) -> Path:
    with open(path, "wb") as file:
        writer = TarWriter(file)
        for key in ("000", "001"):
            writer.add(f"{key}.latent.pt", saved(latents))
            writer.add(f"{key}.embed.pt", saved(embed))
            writer.add(f"{key}.prompt.txt", f"prompt {key}\n".encode())
        writer.finish()
    return path


def write_fastvideo(path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = {"id": "a.b", "caption": "prompt a"}
    for name, tensor in (("vae_latent", LATENTS), ("text_embedding", TEXT)):
        row |= {f"{name}_bytes": tensor.numpy().tobytes(), f"{name}_shape": list(tensor.shape)}
        row |= {f"{name}_dtype": "float32"}
    parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    return path


def test_the_example_of_the_docs_writes_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "data.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/data.md", "exec"), {})
    shards = ShardSet.open("my_shards")
    assert [shards.read(index).caption for index in range(3)] == ["caption 0", "caption 1", "caption 2"]
    manifest = shards.manifest
    assert (manifest.frames, manifest.height, manifest.width, manifest.longest_text) == (17, 64, 64, 7)


def test_latents_of_rcm_become_shards(tmp_path: Path) -> None:
    write_rcm(tmp_path / "a.tar", LATENTS)
    write_rcm(tmp_path / "b.tar", LATENTS[:, :1])  # of another length: skipped
    places = {"latents": str(tmp_path), "out": str(tmp_path / "out"), "codec": TINY}
    config = PrepareConfig.model_validate({**places, "precision": "fp32", "device": "cpu", "threads": 1})
    run(config)
    shards = ShardSet.open(str(tmp_path / "out"))
    sample = shards.read(1)
    assert (len(shards), shards.manifest.skipped) == (2, 2)
    assert (sample.key, sample.caption) == ("a/001", "prompt 001")
    assert sample.latents is not None
    assert torch.equal(sample.latents, LATENTS.transpose(0, 1))
    assert torch.equal(sample.text, torch.ones(3, 64))
    with pytest.raises(UserError, match=r"out: .* contains shards; name a new folder"):
        run(config)


def test_cached_latents_of_several_sizes_go_into_buckets(tmp_path: Path) -> None:
    for name, latents in (("a", LATENTS[:, :1]), ("b", LATENTS), ("c", LATENTS[:, :, :2])):
        write_rcm(tmp_path / f"{name}.tar", latents)
    places = {"latents": str(tmp_path), "out": str(tmp_path / "out"), "codec": TINY}
    sizes = {"buckets": ["5x32x32", "1x32x32", "9x32x32"], "samples_per_shard": 3}
    run(PrepareConfig.model_validate({**places, **sizes, "precision": "fp32", "device": "cpu", "threads": 1}))
    shards = ShardSet.open(str(tmp_path / "out")).of_all_sizes()
    assert {str(size): count for size, count in shards.manifest.counts.items()} == {
        "5x32x32": 2,
        "1x32x32": 2,
        "9x32x32": 0,
    }
    assert (shards.manifest.frames, shards.manifest.skipped) == (5, 2)
    assert [len(sample.latents) for sample in map(shards.read, range(4)) if sample.latents is not None] == [1, 1, 2, 2]


def test_texts_of_another_encoder_are_refused(tmp_path: Path) -> None:
    sample = Sample("a", LATENTS.transpose(0, 1), torch.ones(3, 32), "a")
    with pytest.raises(UserError, match="the text of a has 32 numbers per token, but the negative prompt 64"):
        write_folder(tmp_path, [sample], CodecInfo(source="a", text_encoder="b"), PromptTexts(TEXT, ()))


def test_latents_of_fastvideo_are_normalised(tmp_path: Path) -> None:
    codec = Codec.load(TINY, "cpu")
    path = write_fastvideo(tmp_path / "a.parquet")
    (sample,) = read_cached(path, codec.latents_mean, codec.latents_std, torch.float32)
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (codec.latents_mean, codec.latents_std))
    assert sample.latents is not None
    assert torch.allclose(sample.latents, ((LATENTS - mean) / std).transpose(0, 1))
    assert (sample.key, sample.caption, len(sample.text)) == ("a/a_b", "prompt a", 3)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rcm(tmp_path / "a.tar", LATENTS, Harmful())
    with pytest.raises(UserError, match=r"latents: .*a.tar cannot be read"):
        list(read_cached(path, (0.0,), (1.0,), torch.float32))
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"is no .parquet or .tar file"):
        list(read_cached(tmp_path / "none", (0.0,), (1.0,), torch.float32))


def test_an_empty_tensor_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        writer = TarWriter(file)
        for name, content in (("latent.pt", b""), ("embed.pt", saved(TEXT)), ("prompt.txt", b"a prompt")):
            writer.add(f"000.{name}", content)
        writer.finish()
    with pytest.raises(UserError, match=r"a.tar cannot be read: a tensor cannot be loaded \(EOFError\)"):
        list(read_cached(path, (0.0,), (1.0,), torch.float32))
