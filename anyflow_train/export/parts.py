"""Parts of a pipeline folder that training does not change (tokenizer, text encoder, VAE), and the index."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers

from anyflow_train import files
from anyflow_train.errors import UserError, reason_of
from anyflow_train.files import inside, regular, write_json
from anyflow_train.models.weight_files import check_weight_files

INDEX = "model_index.json"
COPIED = ("tokenizer", "text_encoder", "vae")
COPIED_FILES = {
    "tokenizer": (
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("spiece.model", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
    ),
    "text_encoder": ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    "vae": ("config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    "scheduler": ("scheduler_config.json",),
}
"""Part -> its files in an export: configs, vocabularies and safetensors; no code, and no pickles."""
CODE, PLACES = "auto_map", ("_name_or_path", "name_or_path")
"""Keys of a config that name Python code to import, and folders of whoever saved it."""
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
    """Copy tokenizer, text encoder and VAE. Raises UserError, like `copy_part`."""
    for name in COPIED:
        copy_part(source, folder, name)


def copy_part(source: Path, folder: Path, part: str) -> None:
    """Copy the known files of one part. Links, as in the hub's cache, become files.

    Raises:
        UserError: a file is not a regular file of `source`, or its config names Python code to import.
    """
    (folder / part).mkdir()
    for found in sorted({path for pattern in COPIED_FILES[part] for path in (source / part).glob(pattern)}):
        name = f"{part}/{found.name}"
        try:
            path = regular(inside(source, name))
        except OSError as error:
            raise UserError("codec", f"'{name}' of '{source}' {error.strerror}") from None
        content = read_json(path) if found.name.endswith("config.json") else {}
        if CODE in content:
            raise UserError("codec", f"'{name}' of '{source}' names Python code ({CODE}), which is never imported")
        if content.keys().isdisjoint(PLACES):
            shutil.copyfile(path, folder / name)
        else:
            write_json(folder / name, {key: value for key, value in content.items() if key not in PLACES})


def write_index(folder: Path, pipeline: str, **more: Any) -> None:
    """Write `model_index.json` of a complete folder, with the classes that its own configs name.

    Args:
        pipeline: name of diffusers' pipeline class.
        more: additional entries that this class requires.
    """
    encoder = read_json(folder / "text_encoder" / "config.json")["architectures"][0]
    tokenizer = read_json(folder / "tokenizer" / "tokenizer_config.json")["tokenizer_class"]
    configs = {"scheduler": "scheduler_config.json", "transformer": "config.json", "vae": "config.json"}
    index = {
        "_class_name": pipeline,
        "_diffusers_version": diffusers.__version__,
        "text_encoder": ["transformers", encoder],
        "tokenizer": ["transformers", tokenizer],
        **{part: ["diffusers", read_json(folder / part / file)["_class_name"]] for part, file in configs.items()},
    }
    write_json(folder / INDEX, index | more)


def _snapshot(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [f"{part}/{pattern}" for part, patterns in COPIED_FILES.items() for pattern in patterns]
    try:
        return Path(snapshot_download(source, allow_patterns=[INDEX, *wanted]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        problem = f"is not a folder, and the hub does not provide it: {reason_of(error)}"
        raise UserError("codec", f"'{source}' {problem}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if the file cannot be read."""
    try:
        content = files.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(str(path), "is not a JSON object")
    return content
