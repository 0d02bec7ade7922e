"""Damaged, foreign and incomplete files of weights are refused in one sentence that names the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anyflow_train.data.fingerprint import component_fingerprint
from anyflow_train.errors import UserError
from anyflow_train.models.codec import Codec
from anyflow_train.models.pretrained import open_pretrained
from anyflow_train.models.weight_files import check_weight_files
from tests.models.networks import TINY_WAN

NAMES = tuple(open_pretrained(TINY_WAN).tensors)
FILE = "diffusion_pytorch_model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n"


def poisoned(value: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        weights = load_file(path)
        name = min(name for name in weights if name.endswith("weight"))
        weights[name].view(-1)[-1] = value
        save_file(weights, path, {"format": "pt"})

    return change


WRONG = {
    "pointer": (lambda path: path.write_bytes(POINTER), "is a Git LFS pointer"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged or not a safetensors file"),
    "foreign": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "is damaged or not a safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged or not a safetensors file"),
    "absent": (Path.unlink, "no safetensors file|cannot be read|cannot read its weights"),
    "fifo": (lambda path: (path.unlink(), os.mkfifo(path)), "is not a regular file"),
    "nan": (poisoned(float("nan")), r"the weight '.*weight' contains NaN or inf"),
    "inf": (poisoned(float("-inf")), r"the weight '.*weight' contains NaN or inf"),
}


@pytest.fixture(params=WRONG)
def wrong(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str, str], tuple[Path, str]]:
    """Damage one file of a copied pipeline. Returns the pipeline and the expected message."""

    def damage(part: str, file: str) -> tuple[Path, str]:
        shutil.copytree(TINY_WAN / part, tmp_path / "wan" / part)
        change, message = WRONG[request.param]
        change(tmp_path / "wan" / part / file)
        return tmp_path / "wan", message

    return damage


def test_a_transformer_is_refused(wrong: Callable[[str, str], tuple[Path, str]]) -> None:
    folder, message = wrong("transformer", FILE)
    with pytest.raises(UserError, match=message) as refused:
        [open_pretrained(folder).read(name) for name in NAMES]
    assert str(folder) in str(refused.value)


def test_a_vae_is_refused(wrong: Callable[[str, str], tuple[Path, str]]) -> None:
    folder, message = wrong("vae", FILE)
    with pytest.raises(UserError, match=message) as refused:
        Codec.load(folder, "cpu")
    assert str(folder / "vae") in str(refused.value)
    with pytest.raises(UserError, match=message):
        check_weight_files(folder / "vae")


def test_a_text_encoder_is_refused(wrong: Callable[[str, str], tuple[Path, str]]) -> None:
    folder, message = wrong("text_encoder", "model.safetensors")
    shutil.copytree(TINY_WAN / "vae", folder / "vae")
    shutil.copytree(TINY_WAN / "tokenizer", folder / "tokenizer")
    with pytest.raises(UserError, match=message) as refused:
        Codec.load(folder, "cpu").encode_text(["a"])
    assert str(folder / "text_encoder") in str(refused.value)


def test_a_vae_without_one_weight_is_not_filled_with_random_numbers(tmp_path: Path) -> None:
    shutil.copytree(TINY_WAN / "vae", tmp_path / "vae")
    weights = load_file(tmp_path / "vae" / FILE)
    del weights["decoder.conv_out.bias"]
    save_file(weights, tmp_path / "vae" / FILE, {"format": "pt"})
    with pytest.raises(UserError, match=r"vae: has no weight 'decoder\.conv_out\.bias'"):
        Codec.load(tmp_path, "cpu")


def test_an_index_names_the_file_that_is_missing(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-2\.safetensors: does not exist, but model\.safetensors\.index\.json"):
        check_weight_files(tmp_path)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[1]", "\x00"])
@pytest.mark.parametrize("name", ["vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer.json"])
def test_a_damaged_config_is_one_sentence(tmp_path: Path, name: str, content: str) -> None:
    folder = shutil.copytree(TINY_WAN, tmp_path / "wan", ignore=shutil.ignore_patterns("build"))
    (folder / name).write_text(content)
    with pytest.raises(UserError) as refused:
        Codec.load(folder, "cpu").encode_text(["a"])
    assert str(folder) in str(refused.value)
    if not name.startswith("tokenizer"):
        with pytest.raises(UserError, match="cannot be read"):
            component_fingerprint(str(folder), name.partition("/")[0])
