"""Short names for model files, so that two runs can tell whether they use the same VAE or text encoder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from anyflow_train.config.pipelines import read_intact
from anyflow_train.files import regular

# For larger files only both ends are read: hashing UMT5-XXL's 11 GiB would take longer than loading it.
WHOLE_FILE_BYTES = 1 << 30
END_BYTES = 64 << 20
NAMED = "name:"
"""Prefix of the fingerprint of a component whose files could not be read: it cannot be compared with others."""


def known_fingerprint(source: str | None, component: str) -> str | None:
    """Return `component_fingerprint`, or None if there is no source or its files cannot be read."""
    return None if source is None else known(component_fingerprint(source, component))


def known(fingerprint: str | None) -> str | None:
    """Return the fingerprint, or None if it only names a component whose files could not be read."""
    return None if fingerprint is None or fingerprint.startswith(NAMED) else fingerprint


def component_fingerprint(source: str, component: str) -> str:
    """Hash the config and weight files of a pipeline's component (`vae`, `text_encoder`).

    Args:
        source: pipeline folder or hub id. The component is downloaded if it is not in the cache. If the hub cannot be
            reached, the name takes the place of the hash.

    Raises:
        UserError: its config is damaged. OSError: a file of weights cannot be read.
    """
    folder = _folder(source, component)
    if folder is None:
        return f"{NAMED}{source}"
    config = read_intact(folder / "config.json")
    # These keys name the origin of the files. They do not change what the component computes.
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        _update(digest, path)
    return digest.hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """Hash one file of weights. Raises OSError if it cannot be read."""
    digest = hashlib.sha256()
    _update(digest, path)
    return digest.hexdigest()[:16]


def _folder(source: str, component: str) -> Path | None:
    root = Path(source).expanduser()
    if not root.is_dir():
        # Imported here, because `anyflow check` reads manifests and has no time for the hub.
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        try:
            files = [f"{component}/config.json", f"{component}/*.safetensors"]
            root = Path(snapshot_download(source, allow_patterns=files))
        except (OSError, HFValidationError):
            return None
    return root / component if (root / component / "config.json").is_file() else None


def _update(digest: hashlib._Hash, path: Path) -> None:
    with open(regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        if size <= WHOLE_FILE_BYTES:
            hashlib.file_digest(file, lambda: digest)
            return
        digest.update(file.read(END_BYTES))
        file.seek(size - END_BYTES)
        digest.update(file.read(END_BYTES))
