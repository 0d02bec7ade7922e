"""Parts that an export copies from a pipeline of others."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from anyflow_train.errors import UserError
from anyflow_train.export.parts import copy_parts, write_index
from anyflow_train.export.provenance import public_config
from anyflow_train.models.codec import Codec
from anyflow_train.models.pretrained import open_pretrained

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "assets" / "tiny-wan", tmp_path / "source"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_only_known_files_are_copied(source: Path, out: Path) -> None:
    for name in ("vae/code.py", "text_encoder/pytorch_model.bin", "tokenizer/.env", "vae/deep/model.safetensors"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("x")
    copy_parts(source, out)
    copied = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {path.suffix for path in map(Path, copied)} <= {".json", ".safetensors", ".model"}
    assert {"vae/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"} <= copied


def test_a_link_out_of_the_pipeline_is_not_copied(source: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "passwd").write_text("secret")
    (source / "tokenizer" / "vocab.txt").symlink_to(tmp_path / "passwd")
    with pytest.raises(UserError, match=r"'tokenizer/vocab.txt' of .* leads out of its folder"):
        copy_parts(source, out)


def test_a_fifo_is_not_copied(source: Path, out: Path) -> None:
    os.mkfifo(source / "tokenizer" / "vocab.txt")
    with pytest.raises(UserError, match="is not a regular file"):
        copy_parts(source, out)


def test_links_of_the_hubs_cache_become_files(source: Path, out: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--me" / "snapshots" / "abc", tmp_path / "models--me" / "blobs"
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    blobs.mkdir()
    weights = snapshot / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(blobs / "0123")
    weights.symlink_to(os.path.relpath(blobs / "0123", weights.parent))
    copy_parts(snapshot, out)
    assert (out / "vae" / weights.name).read_bytes() == (blobs / "0123").read_bytes()
    assert not (out / "vae" / weights.name).is_symlink()


def test_code_is_refused_and_local_paths_are_left_out(source: Path, out: Path) -> None:
    edit(source / "text_encoder" / "config.json", _name_or_path="/home/me/secret")
    edit(source / "tokenizer" / "tokenizer_config.json", name_or_path="/home/me/secret")
    copy_parts(source, out)
    assert not [path for path in out.rglob("*.json") if "/home/me" in path.read_text()]
    other = out.with_name("other")
    other.mkdir()
    edit(source / "vae" / "config.json", auto_map={"AutoModel": "me/code--x.Y"})
    with pytest.raises(UserError, match=r"'vae/config.json' .* names Python code"):
        copy_parts(source, other)


def test_the_index_names_classes_of_known_libraries(source: Path, out: Path) -> None:
    edit(source / "model_index.json", text_encoder=["evil_module", "Encoder"])
    copy_parts(source, out)
    for part, file in (("scheduler", "scheduler_config.json"), ("transformer", "config.json")):
        (out / part).mkdir()
        shutil.copy(source / part / file, out / part / file)
    write_index(out, "AnyFlowPipeline")
    index = json.loads((out / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "UMT5EncoderModel"]


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_pickle_is_not_loaded(source: Path, part: str) -> None:
    (weights,) = (source / part).glob("*.safetensors")
    weights.rename(weights.with_name("pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"))
    with pytest.raises(UserError, match=rf"{part}: contains no safetensors file"):
        Codec.load(str(source), "cpu").encode_text(["a"])


@pytest.mark.parametrize("weight_map", [{"a": "../x.safetensors"}, {"a": "/etc/passwd"}, {"a": 1}, [], None])
def test_an_index_of_weights_names_files_of_its_folder(source: Path, weight_map: object) -> None:
    index = source / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="does not map weights to files"):
        open_pretrained(source)


def test_an_exports_config_contains_no_path_of_this_machine(tmp_path: Path) -> None:
    place, init = str(tmp_path / "private"), {"fake_score": {"init": str(tmp_path / "private" / "teacher")}}
    config = {"name": "a", "data": {"generations": {place: 1}, "frames": 5}, "on_policy": {"matching": init}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"teacher": {"source": place}, "hub": "owner/name"}))
    found = public_config(tmp_path)
    assert str(tmp_path) not in json.dumps(found)
    assert found["on_policy"]["matching"]["fake_score"]["init"] == "teacher"
    assert (found["data"], found["hub"]) == ({"frames": 5}, "owner/name")
