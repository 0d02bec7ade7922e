"""Reading checkpoints: one safetensors entry per parameter under its model name, and JSON, for any engine and reader.

A folder `step_00000123` holds `config.json`, `state.json` and, for each group of tensors (`weights`, `ema`, `exp_avg`,
`exp_avg_sq`), files `<group>-00001.safetensors` ... It appears whole, by a rename, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from anyflow_train.errors import UserError
from anyflow_train.training.files import file_sha256, to_json
from anyflow_train.training.state import Best, TrainState

FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")


class DamagedCheckpoint(Exception):
    """A checkpoint that is not what was written: a file is missing, cut off or changed."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself.

    Attributes:
        config: the run's resolved config, undecoded.
        state: the run's state.
        adam_steps: Adam's step count of every trainable role.
        files: sha256 of every other file of the folder.
    """

    config: dict[str, Any]
    state: TrainState
    adam_steps: dict[str, int]
    files: dict[str, str]


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def read_info(checkpoint: Path) -> CheckpointInfo:
    """Read the JSON part of a checkpoint.

    Raises:
        DamagedCheckpoint: `state.json` or `config.json` is missing or changed.
        UserError: it was written in a format that this version does not know.
    """
    try:
        content = json.loads((checkpoint / "state.json").read_text())
        checksum = content.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{checkpoint / 'state.json'} cannot be read ({error})") from error
    if checksum != content_checksum(content):
        raise DamagedCheckpoint(f"{checkpoint / 'state.json'} does not match its checksum")
    if content["format"] != FORMAT:
        raise UserError(str(checkpoint), f"has format {content['format']}; this version reads format {FORMAT}")
    _verify(checkpoint, {"config.json": content["files"]["config.json"]})
    state = dict(content["state"])
    best = None if state["best"] is None else Best(**state["best"])
    config = json.loads((checkpoint / "config.json").read_text())
    return CheckpointInfo(config, TrainState(**{**state, "best": best}), content["adam_steps"], content["files"])


def verify_checkpoint(checkpoint: Path) -> CheckpointInfo:
    """Read the JSON part and compare every file with its checksum.

    Raises:
        DamagedCheckpoint: a file is missing or changed; the message names it.
    """
    info = read_info(checkpoint)
    _verify(checkpoint, info.files)
    return info


def read_tensors(checkpoint: Path, group: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one group by model name, on the CPU, one at a time.

    Raises:
        DamagedCheckpoint: there is no such group.
    """
    paths = sorted(checkpoint.glob(f"{group}-[0-9]*.safetensors"))
    if not paths:
        raise DamagedCheckpoint(f"{checkpoint} holds no '{group}' tensors")
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, file.get_tensor(name)


@torch.no_grad()
def restore_tensors(checkpoint: Path, group: str, targets: Iterable[tuple[str, Tensor]]) -> None:
    """Copy a group into existing tensors; names and shapes must agree exactly.

    Raises:
        UserError: a tensor is missing, left over, or of another shape; names the checkpoint and the tensor.
    """
    wanted = dict(targets)
    for name, tensor in read_tensors(checkpoint, group):
        target = wanted.pop(name, None)
        if target is None:
            raise UserError(str(checkpoint), f"holds '{name}' ({group}), which the configured student does not train")
        if target.shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, but the student's has {tuple(target.shape)}"
            raise UserError(str(checkpoint), f"'{name}' ({group}) has shape {shapes}")
        target.copy_(tensor)
    if wanted:
        raise UserError(str(checkpoint), f"lacks '{next(iter(wanted))}' ({group}), which the configured student trains")


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a run directory (its best, else its latest) or a checkpoint folder stands for.

    Raises:
        UserError: there is none.
    """
    path = Path(path).expanduser()
    if (path / "state.json").is_file():
        return path
    folder = path / "checkpoints"
    found = list_checkpoints(folder)
    if not found:
        raise UserError(str(path), "is neither a checkpoint nor a run directory that holds one")
    try:
        best = folder / checkpoint_name(json.loads((folder / "best").read_text())["step"])
    except (OSError, ValueError, KeyError):
        return found[-1]
    return best if best in found else found[-1]


def content_checksum(content: dict[str, Any]) -> str:
    """Checksum of `state.json`'s own content, kept in it beside the rest."""
    return hashlib.sha256(to_json(content)).hexdigest()


def _verify(checkpoint: Path, files: Mapping[str, str]) -> None:
    for name, checksum in files.items():
        try:
            actual = file_sha256(checkpoint / name)
        except OSError as error:
            raise DamagedCheckpoint(f"{checkpoint / name} cannot be read ({error.strerror})") from error
        if actual != checksum:
            raise DamagedCheckpoint(f"{checkpoint / name} does not match its checksum")
