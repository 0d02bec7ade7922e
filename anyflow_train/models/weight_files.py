"""Open files of weights. Damaged and foreign files, and numbers that are not finite, are refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anyflow_train.config.original import unreadable
from anyflow_train.errors import UserError
from anyflow_train.files import read_json, regular


def open_weights(path: Path) -> Any:
    """Open a safetensors file. No tensor is read yet.

    Raises:
        UserError: the file cannot be read, is a Git LFS pointer, is truncated, or has another format.
    """
    try:
        return safe_open(regular(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(str(path), unreadable(path, error)) from error


def read_weight(file: Any, name: str, where: str | Path) -> Tensor:
    """Read one weight of an open file.

    Raises:
        UserError: it contains numbers that are not finite; names `where`.
    """
    tensor = file.get_tensor(name)
    check_finite([(name, tensor)], where)
    return tensor


def check_finite(weights: Iterable[tuple[str, Tensor]], where: str | Path) -> None:
    """Check that weights are finite. Raises UserError with `where` and the name of the first one that is not."""
    for name, weight in weights:
        if not torch.isfinite(weight).all():
            raise UserError(str(where), f"the weight '{name}' contains NaN or inf; use weights of an intact model")


def check_weight_files(folder: Path) -> None:
    """Check that a component's folder has safetensors files, and that all of their weights can be read and are finite.

    Raises:
        UserError: names the file that is missing or wrong.
    """
    for path in component_files(folder):
        file = open_weights(path)
        for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
            read_weight(file, name, path)


def component_files(folder: Path) -> Iterator[Path]:
    """Iterate over the safetensors files of a component in diffusers' or transformers' layout.

    Raises:
        UserError: a file that the index names does not exist, or there is no file at all.
    """
    found = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        names = set(read_index(index).values())
        if missing := sorted(names - {path.name for path in found}):
            raise UserError(str(folder / missing[0]), f"does not exist, but {index.name} names it")
    if not found:
        raise UserError(str(folder), "contains no safetensors file; name a folder with the weights of its config")
    yield from found


def read_index(path: Path) -> dict[str, str]:
    """Read an index of weight files: weight name -> file name. Raises UserError if it is not one."""
    try:
        return dict(read_json(path)["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(str(path), f"is not an index of weight files ({unreadable(path, error)})") from error
