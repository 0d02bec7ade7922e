"""Short names for model files, so that two runs can tell whether they use the same VAE or text encoder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

# Beyond this size only the ends are read: UMT5-XXL's 11 GiB would take longer to hash than to load.
WHOLE_FILE_BYTES = 1 << 30
END_BYTES = 64 << 20


NAMED = "name:"  # of a component whose files were out of reach: it cannot be told from another's


def known_fingerprint(source: str | None, component: str) -> str | None:
    """`component_fingerprint`, or None where there is no source or its files are out of reach."""
    if source is None:
        return None
    fingerprint = component_fingerprint(source, component)
    return None if fingerprint.startswith(NAMED) else fingerprint


def component_fingerprint(source: str, component: str) -> str:
    """A fingerprint of a pipeline's component (`vae`, `text_encoder`): of its config and weight files.

    Args:
        source: pipeline folder or hub id, of which the component is downloaded unless it is there already; where the
            hub cannot be reached the fingerprint is of the name.
    """
    folder = _folder(source, component)
    if folder is None:
        return f"{NAMED}{source}"
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text())
    # What names where the files came from, or who saved them, says nothing about what they compute.
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            _update(digest, file)
    return digest.hexdigest()[:16]


def _folder(source: str, component: str) -> Path | None:
    root = Path(source)
    if not root.is_dir():
        try:
            files = [f"{component}/config.json", f"{component}/*.safetensors"]
            root = Path(snapshot_download(source, allow_patterns=files))
        except (OSError, HFValidationError):
            return None
    return root / component if (root / component / "config.json").is_file() else None


def _update(digest: hashlib._Hash, file: BinaryIO) -> None:
    size = os.fstat(file.fileno()).st_size
    digest.update(size.to_bytes(8, "little"))
    if size <= WHOLE_FILE_BYTES:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return
    digest.update(file.read(END_BYTES))
    file.seek(size - END_BYTES)
    digest.update(file.read(END_BYTES))
