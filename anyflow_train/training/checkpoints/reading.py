"""Read checkpoints: JSON files, and one safetensors entry per parameter under its model name, for any engine.

A folder `step_00000123` holds `config.json`, `network.json`, `state.json` and, for each group of tensors, files
`<group>-00001.safetensors` ... Groups are `weights`, `ema`, `exp_avg` and `exp_avg_sq`; 8-bit moments are codes with
the additional groups `exp_avg_scale` and `exp_avg_sq_scale`. A checkpoint is written to a temporary folder and renamed,
so that it is complete or absent.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from anyflow_train.errors import UserError
from anyflow_train.files import (
    FileName,
    file_sha256,
    inside,
    networks_inside,
    parse_json,
    read_inside,
    read_json,
    regular,
    to_json,
)
from anyflow_train.training.checkpoints import network_file
from anyflow_train.training.checkpoints.config_file import first_key, under_new_names
from anyflow_train.training.checkpoints.network_file import NetworkFile
from anyflow_train.training.checkpoints.state import TrainState, checkpoint_name, list_checkpoints
from anyflow_train.training.checkpoints.tensor_handle import Entry
from anyflow_train.training.processes.world import ALONE, World

FORMAT = 1
_STATE = TypeAdapter(TrainState)


class _StateFile(BaseModel):
    """Types of `state.json`. Its names are those of files in the same folder."""

    state: dict[str, Any]
    adam_steps: dict[str, int]
    files: dict[FileName, str]


class DamagedCheckpoint(UserError):
    """A checkpoint has a missing, truncated or changed file.

    Args:
        path: the file, or the folder of the checkpoint.
        problem: what is wrong with it.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(str(path), problem)


@dataclass(frozen=True)
class CheckpointInfo:
    """The JSON part of a checkpoint.

    Attributes:
        path: folder of the checkpoint.
        config: resolved config of the run, not decoded.
        state: state of the run.
        adam_steps: Adam's step count of every trained role.
        files: sha256 of every other file in the folder.
    """

    path: Path
    config: dict[str, Any]
    state: TrainState
    adam_steps: dict[str, int]
    files: dict[str, str]


def set_aside(path: Path) -> Path:
    """Rename what is not an intact checkpoint to `damaged_...`. Returns the new path."""
    aside, number = path.with_name(f"damaged_{path.name}"), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"damaged_{path.name}_{number}")
    return path.rename(aside)


def read_info(checkpoint: Path) -> CheckpointInfo:
    """Read the JSON part of a checkpoint.

    Raises:
        DamagedCheckpoint: `state.json` or `config.json` is missing or changed.
        UserError: it was written in a format that this version does not support.
    """
    content = read_state(checkpoint)
    _verify(checkpoint, {"config.json": content["files"].get("config.json", "")})
    try:
        state = _STATE.validate_python(content["state"])
    except ValidationError as error:
        problem = f"was written by another version of anyflow_train ({first_key(error)})"
        raise UserError(str(checkpoint), problem) from None
    config = _read_object(checkpoint, "config.json")
    return CheckpointInfo(checkpoint, config, state, content["adam_steps"], content["files"])


def read_network(checkpoint: Path) -> NetworkFile:
    """Read the description of a checkpoint's network. The rest of its config does not need to be valid.

    Raises:
        DamagedCheckpoint: a file is missing or changed.
        UserError: it was written in a format that this version does not support.
    """
    files = read_state(checkpoint)["files"]
    own = network_file.NAME in files
    path = checkpoint / (network_file.NAME if own else "config.json")
    _verify(checkpoint, {path.name: files.get(path.name, "")})
    content = _read_object(checkpoint, path.name)
    if own:
        return NetworkFile.of_file(content, str(path))
    return NetworkFile.of_saved(under_new_names(content, str(path)), str(path))


def read_step(checkpoint: Path) -> int:
    """Read the number of training steps before a checkpoint.

    Raises:
        DamagedCheckpoint: `state.json` is missing or changed.
        UserError: it was written in a format that this version does not support.
    """
    step = read_state(checkpoint)["state"].get("step")
    if not isinstance(step, int):
        raise DamagedCheckpoint(checkpoint / "state.json", "has no number of steps")
    return step


def read_checksum(checkpoint: Path) -> str:
    """Read the checksum of `state.json`, which identifies the content of all files. Errors as in `read_step`."""
    return content_checksum(read_state(checkpoint))


def verify_checkpoint(checkpoint: Path) -> CheckpointInfo:
    """Read the JSON part and compare every file with its checksum.

    Raises:
        DamagedCheckpoint: a file is missing, changed or unknown; the message names it.
    """
    info = read_info(checkpoint)
    _check_listed(checkpoint, "*", info.files)
    _verify(checkpoint, info.files)
    return info


def verify_group(checkpoint: Path, group: str) -> None:
    """Compare the files of a group with their checksums. Unchanged files are hashed once per process.

    Raises:
        DamagedCheckpoint: a file is missing, changed or unknown; the message names it.
    """
    files = read_state(checkpoint)["files"]
    _check_listed(checkpoint, group, files)
    for name in sorted(name for name in files if re.fullmatch(rf"{group}-\d+\.safetensors", name)):
        with _readable(checkpoint / name):
            found = (checkpoint / name).stat()
            _verify_once(checkpoint / name, files[name], found.st_size, found.st_mtime_ns)


def _check_listed(checkpoint: Path, group: str, files: Mapping[str, str]) -> None:
    # A file that is not listed has no checksum, but its tensors would be read.
    for path in _group_files(checkpoint, group):
        if path.name not in files:
            raise DamagedCheckpoint(path, "is not listed in state.json")


@cache
def _verify_once(path: Path, checksum: str, _size: int, _changed: int) -> None:
    _verify(path.parent, {path.name: checksum})


@torch.no_grad()
def restore_tensors(checkpoint: Path, group: str, entries: Mapping[str, Entry], world: World = ALONE) -> None:
    """Copy a group's tensors into the entries. Names and shapes must be equal. Only rank 0 reads the files.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape, or not finite; names checkpoint and tensor.
    """
    world.on_main(lambda: check_shapes(checkpoint, group, {name: entry.shape for name, entry in entries.items()}))
    stored = open_tensors(checkpoint, group) if world.is_main else {}
    nonfinite: list[str] = []
    for name, entry in entries.items():
        whole = stored[name].get_tensor(name) if world.is_main else torch.empty(entry.shape, dtype=entry.dtype)
        if world.is_main and not whole.isfinite().all():
            nonfinite.append(name)  # raised after the last broadcast, which the other processes wait for
        entry.write(world.broadcast_tensor(whole.to(world.device)))
    with world.together():
        if nonfinite:
            problem = f"'{nonfinite[0]}' ({group}) contains numbers that are not finite; remove this checkpoint"
            raise UserError(str(checkpoint), f"{problem} to resume from the one before it")


def resolve_checkpoint(path: str | Path) -> Path:
    """Find the checkpoint of a path: a checkpoint folder itself, or the best, else the latest, of a run directory.

    Raises:
        UserError: there is no checkpoint.
    """
    path = Path(path).expanduser()
    if (path / "state.json").is_file():
        return path
    folder = path / "checkpoints"
    found = list_checkpoints(folder)
    if not found:
        problem = "is neither a checkpoint nor a run directory that contains one"
        raise UserError(str(path), problem + networks_inside(path, "checkpoints"))
    try:
        best = folder / checkpoint_name(read_json(folder / "best")["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return found[-1]
    return best if best in found else found[-1]


def content_checksum(content: dict[str, Any]) -> str:
    """Checksum of the content of `state.json`, which is stored in the same file."""
    return hashlib.sha256(to_json(content)).hexdigest()


def check_shapes(checkpoint: Path, group: str, shapes: Mapping[str, torch.Size]) -> None:
    """Compare the names and shapes of a group's tensors with those of the trained parameters.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape; names the checkpoint and the tensor.
    """
    stored = open_tensors(checkpoint, group)
    for name, file in stored.items():
        if name not in shapes:
            raise UserError(str(checkpoint), f"contains '{name}' ({group}), which its network does not train")
        shape, wanted = tuple(file.get_slice(name).get_shape()), tuple(shapes[name])
        if shape != wanted:
            raise UserError(str(checkpoint), f"'{name}' ({group}) has shape {shape}, but its network's has {wanted}")
    missing = shapes.keys() - stored.keys()
    if missing:
        raise UserError(str(checkpoint), f"lacks '{min(missing)}' ({group}), which its network trains")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read `state.json`, which contains the checksums of all other files.

    Raises:
        DamagedCheckpoint: it is missing or changed.
        UserError: it was written in a format that this version does not support.
    """
    try:
        content = parse_json(read_inside(checkpoint, "state.json"))
        checksum = content.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise DamagedCheckpoint(checkpoint / "state.json", f"cannot be read ({error})") from error
    if checksum != content_checksum(content):
        raise DamagedCheckpoint(checkpoint / "state.json", "does not match its checksum")
    if content.get("format") != FORMAT:
        raise UserError(str(checkpoint), f"has format {content.get('format')}; this version reads format {FORMAT}")
    try:
        _StateFile.model_validate(content)
    except ValidationError as error:
        problem = f"{first_key(error)}: {error.errors()[0]['msg']}"
        raise DamagedCheckpoint(checkpoint / "state.json", f"has other content ({problem})") from None
    return content


def _read_object(checkpoint: Path, name: str) -> dict[str, Any]:
    try:
        content = parse_json(read_inside(checkpoint, name))
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(checkpoint / name, f"cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise DamagedCheckpoint(checkpoint / name, "is not a JSON object")
    return content


def open_tensors(checkpoint: Path, group: str) -> dict[str, Any]:
    """Open the files of a group. Returns the file of every tensor by model name; no tensor is read yet.

    Raises:
        DamagedCheckpoint: there is no such group.
    """
    paths = _group_files(checkpoint, group)
    if not paths:
        raise DamagedCheckpoint(checkpoint, f"contains no '{group}' tensors")
    try:
        files = [safe_open(regular(inside(checkpoint, path.name)), framework="pt") for path in paths]
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpoint(checkpoint, f"has a file of '{group}' that cannot be read ({error})") from error
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


def _verify(checkpoint: Path, files: Mapping[str, str]) -> None:
    for name, checksum in files.items():
        with _readable(checkpoint / name):
            actual = file_sha256(checkpoint / name)
        if actual != checksum:
            raise DamagedCheckpoint(checkpoint / name, "does not match its checksum")


def _group_files(checkpoint: Path, group: str) -> list[Path]:
    return sorted(checkpoint.glob(f"{group}-[0-9]*.safetensors"))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DamagedCheckpoint(path, f"cannot be read ({error.strerror})") from error
