"""`anyflow shards` counts what a folder holds, and finds clips that are in it twice or in the held-out shards too."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from anyflow_train.__main__ import main
from anyflow_train.data.manifest import PromptTexts
from anyflow_train.data.shards import Sample
from tests.shards import add_index_checksums, describe, write_shards

TINY = Path(__file__).resolve().parents[2] / "assets" / "tiny-wan"
SHAPE = (2, 16, 4, 4)


def make(folder: Path, numbers: Sequence[int], caption: str = "clip {}", noise: float = 0.0) -> Path:
    """Write a shard of clips, which are equal if their numbers are."""
    names = itertools.count()
    samples = [
        Sample(
            f"k{next(names)}",
            torch.full(SHAPE, number / 9) + noise,
            torch.full((number % 3 + 1, 6), float(len(caption))),
            caption.format(number),
        )
        for number in numbers
    ]
    texts = PromptTexts(torch.zeros(1, 6), ())
    return add_index_checksums(write_shards(folder, [samples], describe(SHAPE, 6, longest_text=3), texts))


def test_what_is_there_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, held_out = make(tmp_path / "a", [1, 2, 3, 2, 4]), make(tmp_path / "b", [7, 3])
    assert main(["shards", str(folder), f"held_out={held_out}", f"codec={TINY}", "device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{folder}: 5 samples in 1 shards, 0.")
    assert lines[1] == "clips: 5 frames of 32x32 pixels at 16 fps; latents (2, 16, 4, 4) in fp32"
    assert "texts of all samples: 4 different captions, 1 to 3 tokens, median 2" in lines
    assert "  2 x clip 2" in lines
    assert "equal clips: 2 in 1 groups: k1 = k3" in lines
    assert f"clips that are in {held_out} too: 1 (k2 = k1)" in lines
    assert lines[-1] == f"contact sheet of 5 samples: {folder}/contact_sheet.png"
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.width > 4 * 128  # four columns of enlarged pictures
        assert sheet.height > 2 * 128


def test_equal_clips_with_other_captions_are_found_if_all_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anyflow_train.commands.shards.MOST_READ", 1)
    folder, other = make(tmp_path / "a", [1, 2, 3]), make(tmp_path / "b", [3, 5], "another caption {}", 1e-6)
    for verify, found in (("false", 0), ("true", 1)):
        assert main(["shards", f"folder={folder}", "pictures=0", f"verify={verify}", f"held_out={other}"]) == 0
        assert f"clips that are in {other} too: {found}" in capsys.readouterr().out


def test_bad_samples_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "a", [1, 2, 3])
    data = bytearray((folder / "shard-000000.tar").read_bytes())
    data[1600] ^= 1
    (folder / "shard-000000.tar").write_bytes(data)
    assert main(["shards", str(folder), "verify=true", "pictures=0"]) == 1
    found = capsys.readouterr().out
    assert "bad sample: shard-000000.tar: k0: the bytes do not match the checksum" in found
    assert "1 of 3 samples that were read are bad" in found


def test_a_contact_sheet_replaces_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = make(tmp_path / "a", [1, 2]), tmp_path / "new" / "sheet.png"
    command = ["shards", str(folder), f"codec={TINY}", "device=cpu", "pictures=1"]
    assert main([*command, f"out={out}"]) == 0
    assert main([*command, f"out={out}"]) == 0  # its own sheet
    Image.new("RGB", (4, 4)).save(mine := tmp_path / "mine.png")
    (link := tmp_path / "link.png").symlink_to(tmp_path / "nothing")
    (text := tmp_path / "text.png").write_text("mine")
    for path in (mine, link, text, folder):
        before = path.lstat().st_mtime_ns
        assert main([*command, f"out={path}"]) == 2
        assert f"out: '{path}' exists, and this command did not write it" in capsys.readouterr().err
        assert path.lstat().st_mtime_ns == before


def test_a_folder_without_shards_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", str(tmp_path)]) == 2
    assert "cannot read manifest.json" in capsys.readouterr().err
