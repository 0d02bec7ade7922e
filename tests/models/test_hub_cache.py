"""A hub id works without a network once `snapshot_download` has been run; what is missing is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import torch
from anyflow_train.errors import UserError
from anyflow_train.models.codec import Codec

codec = Codec.load("me/tiny", "cpu")
print(len(codec.encode_text(["a red ball"])[0]) > 1)
for source, part in (("me/half", "tokenizer"), ("me/nothing", "vae")):
    try:
        Codec.load(source, "cpu").encode_text(["a"])
    except UserError as error:
        print(error)
"""


def cached(home: Path, name: str, *parts: str) -> None:
    repository = home / "hub" / f"models--me--{name}"
    for part in parts:
        shutil.copytree(ROOT / "assets" / "tiny-wan" / part, repository / "snapshots" / "abc" / part)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")


def test_a_cached_hub_id_needs_no_network(tmp_path: Path) -> None:
    cached(tmp_path, "tiny", "vae", "text_encoder", "tokenizer")
    cached(tmp_path, "half", "vae", "text_encoder")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    works, half, nothing = done.stdout.splitlines()
    assert works == "True"
    assert half.startswith(
        "me/half: tokenizer/tokenizer.json is not in the cache, and the hub cannot be reached; run `hf"
    )
    assert nothing.startswith("me/nothing: vae/config.json is not in the cache")
