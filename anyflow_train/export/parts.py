"""Parts of a pipeline folder that training does not change (tokenizer, text encoder, VAE), and the index."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers

from anyflow_train.errors import UserError
from anyflow_train.files import write_json
from anyflow_train.models.weight_files import check_weight_files

INDEX = "model_index.json"
COPIED = ("tokenizer", "text_encoder", "vae")
VAE_CLASS = "AutoencoderKLWan"


def resolve_folder(source: str) -> Path:
    """Return a local pipeline folder, or download the parts of a hub repository and return the local copy.

    Raises:
        UserError: the source does not exist, or parts are missing or damaged.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _snapshot(source)
    missing = [name for name in COPIED if not (folder / name).is_dir()]
    if missing:
        raise UserError("codec", f"'{source}' has no folder '{missing[0]}'; name a Wan2.1 pipeline folder or hub id")
    vae = read_json(folder / "vae" / "config.json").get("_class_name")
    if vae != VAE_CLASS:
        raise UserError("codec", f"the VAE of '{source}' is {vae}; name a pipeline with {VAE_CLASS}")
    for name in ("text_encoder", "vae"):
        check_weight_files(folder / name)
    return folder


def copy_parts(source: Path, folder: Path) -> None:
    """Copy tokenizer, text encoder and VAE. Links, as in the hub's cache, become files."""
    for name in COPIED:
        shutil.copytree(source / name, folder / name)


def write_index(folder: Path, source: Path, pipeline: str, **more: Any) -> None:
    """Write `model_index.json` of a complete folder; classes of `source` and of the folder's own configs.

    Args:
        pipeline: name of diffusers' pipeline class.
        more: additional entries that this class requires.
    """
    known = read_json(source / INDEX) if (source / INDEX).is_file() else {}
    encoder = read_json(folder / "text_encoder" / "config.json")["architectures"][0]
    tokenizer = read_json(folder / "tokenizer" / "tokenizer_config.json")["tokenizer_class"]
    configs = {"scheduler": "scheduler_config.json", "transformer": "config.json", "vae": "config.json"}
    index = {
        "_class_name": pipeline,
        "_diffusers_version": diffusers.__version__,
        "text_encoder": known.get("text_encoder", ["transformers", encoder]),
        "tokenizer": known.get("tokenizer", ["transformers", tokenizer]),
        **{part: ["diffusers", read_json(folder / part / file)["_class_name"]] for part, file in configs.items()},
    }
    write_json(folder / INDEX, index | more)


def _snapshot(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [f"{name}/*" for name in (*COPIED, "scheduler")]
    try:
        return Path(snapshot_download(source, allow_patterns=[INDEX, *wanted]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        problem = str(error).strip().splitlines()[0]
        raise UserError("codec", f"'{source}' is not a folder, and the hub does not provide it: {problem}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if the file cannot be read."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(str(path), f"cannot be read: {error}") from None
