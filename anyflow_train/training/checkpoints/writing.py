"""Write checkpoints atomically and streamed, and delete old ones. `reading` describes the format."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from anyflow_train import __version__
from anyflow_train.config.run import RunConfig
from anyflow_train.files import sync_folder, to_json, write_json, write_synced
from anyflow_train.training.checkpoints import network_file
from anyflow_train.training.checkpoints.config_file import saved_config
from anyflow_train.training.checkpoints.network_file import NetworkFile
from anyflow_train.training.checkpoints.reading import (
    FORMAT,
    content_checksum,
    read_state,
    set_aside,
)
from anyflow_train.training.checkpoints.state import Best, TrainState, checkpoint_name, list_checkpoints, step_of

SHARD_BYTES = 1 << 30
"""Largest size of a file, except for a single larger tensor."""
Tensors = Mapping[str, Iterable[tuple[str, Tensor]]]
"""Group of a checkpoint -> model names and tensors."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}


def save_checkpoint(
    folder: Path, config: RunConfig, state: TrainState, adam_steps: Mapping[str, int], groups: Tensors
) -> Path:
    """Write `folder/step_...` atomically. Tensors are streamed: at most one file's tensors are in memory.

    Args:
        folder: the run's `checkpoints`.
        adam_steps: Adam's step count of every trained role.
        groups: tensors of each group, produced one at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / checkpoint_name(state.step)
    temporary = folder / f".{final.name}.tmp"
    _discard(temporary)
    temporary.mkdir()
    try:
        _fill(temporary, config, state, adam_steps, groups)
        _replace_folder(temporary, final)
    except BaseException:
        _discard(temporary)
        raise
    return final


def _fill(folder: Path, config: RunConfig, state: TrainState, adam_steps: Mapping[str, int], groups: Tensors) -> None:
    described = NetworkFile.of_run(config).model_dump(mode="json")
    files = {
        "config.json": write_synced(folder / "config.json", to_json(saved_config(config))),
        network_file.NAME: write_synced(folder / network_file.NAME, to_json(described)),
    }
    for group, tensors in groups.items():
        for number, shard in enumerate(_shards(tensors), start=1):
            name = f"{group}-{number:05d}.safetensors"
            files[name] = write_synced(folder / name, *_safetensors(shard))
    content = {
        "format": FORMAT,
        "package_version": __version__,
        "state": dataclasses.asdict(state),
        "adam_steps": dict(adam_steps),
        "files": files,
    }
    write_synced(folder / "state.json", to_json({**content, "checksum": content_checksum(content)}))
    sync_folder(folder)


def update_state(folder: Path, state: TrainState) -> None:
    """Replace the state in the checkpoint of its step atomically. Does nothing if there is no such checkpoint."""
    path = folder / checkpoint_name(state.step) / "state.json"
    if path.is_file():
        content = {**read_state(path.parent), "state": dataclasses.asdict(state)}
        write_json(path, {**content, "checksum": content_checksum(content)})


def mark_best(folder: Path, best: Best | None) -> None:
    """Write the name of the best checkpoint to the file `best`, for readers without the run's state."""
    if best is not None:
        write_json(folder / "best", dataclasses.asdict(best))


def prune_checkpoints(folder: Path, keep: int, best: Best | None, keep_every: int = 0) -> None:
    """Delete old checkpoints, and the temporary folders of killed saves.

    Args:
        folder: the run's `checkpoints`.
        keep: number of newest checkpoints to keep.
        best: the best checkpoint, which is kept.
        keep_every: checkpoints whose step is a multiple of this are kept; 0 keeps none of them.
    """
    found = list_checkpoints(folder)
    kept = {path.name for path in found[-keep:]}
    if best is not None:
        kept.add(checkpoint_name(best.step))
    for path in found:
        if path.name not in kept and not (keep_every and step_of(path) % keep_every == 0):
            _delete_folder(path)
    for path in folder.glob(".step_*"):
        _discard(path)


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if shard:
        yield shard


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file piece by piece: length of the header, header, memory of the tensors.

    The library's `save` copies everything twice and holds the GIL, which would stop the training.
    """
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def _replace_folder(temporary: Path, final: Path) -> None:
    """Rename the temporary folder to its final name. An existing folder, equal or damaged, is deleted first."""
    if os.path.lexists(final):
        _delete_folder(final)
    os.rename(temporary, final)
    sync_folder(final.parent)


def _delete_folder(path: Path) -> None:
    """Rename the folder before deleting it, so that readers never see a half-deleted checkpoint.

    A file or a link was not written by a run: it is set aside.
    """
    if path.is_symlink() or not path.is_dir():
        set_aside(path)
        return
    hidden = path.with_name(f".{path.name}.old")
    _discard(hidden)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _discard(temporary: Path) -> None:
    """Delete a temporary folder, or a file or a link of its name."""
    if temporary.is_symlink() or temporary.is_file():
        temporary.unlink()
    shutil.rmtree(temporary, ignore_errors=True)
