"""Weights under the names of Wan's own repository, which ComfyUI uses too. Reads headers of files, without torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyflow_train.errors import UserError, reason_of
from anyflow_train.files import regular

KIND = "WanModel"
"""Class in the `config.json` of Wan's own repository."""
HEAD_DIM = 128
"""Channels per head of all Wan2.1 networks. The files do not contain it; ComfyUI assumes it too."""
PREFIX = "model.diffusion_model."
"""Prefix of the names in files that ComfyUI wrote."""

_LFS_POINTER = b"version https://git-lfs"
_PARTS = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}


def original_name(name: str) -> str:
    """Translate the name of a weight or module of diffusers' Wan2.1 transformer into the name in Wan's repository."""
    if name == "scale_shift_table":
        return "head.modulation"
    dotted = f".{name}."
    for ours, theirs in _PARTS.items():
        dotted = dotted.replace(f".{ours}.", f".{theirs}.")
    return dotted[1:-1]


def is_weights_file(source: str | Path) -> bool:
    """Whether a source is a single file of weights."""
    return Path(source).suffix == ".safetensors" and Path(source).expanduser().is_file()


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the header of a safetensors file: name -> shape.

    Raises:
        UserError: the file cannot be read, is a Git LFS pointer, is truncated, or is not a safetensors file.
    """
    path = path.expanduser()
    try:
        with regular(path).open("rb") as file:
            size, whole = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
            header = json.loads(file.read(size)) if size < min(whole, 1 << 28) else None
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}  # pyright: ignore[reportOptionalMemberAccess]
        if (needed := 8 + size + max((entry["data_offsets"][1] for entry in entries.values()), default=0)) != whole:
            raise ValueError(f"{whole} bytes instead of {needed}")
        return {name: tuple(entry["shape"]) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(str(path), unreadable(path, error)) from None


def unreadable(path: Path, error: Exception) -> str:
    """Say why a file of weights cannot be read."""
    try:
        with regular(path).open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                return "is a Git LFS pointer and not the file itself; run `git lfs pull` in its repository"
    except OSError as unread:
        return f"cannot be read ({unread.strerror})"
    return f"is damaged or not a safetensors file ({reason_of(error)}); copy or download it again"


def architecture(shapes: Mapping[str, tuple[int, ...]], where: str | Path) -> dict[str, Any]:
    """Return the config of diffusers' Wan2.1 transformer for weights of these shapes, under their original names.

    Args:
        shapes: name, with or without ComfyUI's prefix, -> shape.
        where: the file, for errors.

    Raises:
        UserError: they are not the weights of a Wan2.1 text-to-video network.
    """
    plain = {name.removeprefix(PREFIX): shape for name, shape in shapes.items()}
    blocks = {name.split(".")[1] for name in plain if name.startswith("blocks.")}
    try:
        dim, channels, *patch = plain["patch_embedding.weight"]
        ffn, freq = plain["blocks.0.ffn.0.weight"][0], plain["time_embedding.0.weight"][1]
        text, out = plain["text_embedding.0.weight"][1], plain["head.head.weight"][0]
        out //= math.prod(patch)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        problem = "does not contain a Wan2.1 transformer under the names of Wan's own repository"
        raise UserError(str(where), f"{problem}; give such a file, or a folder in diffusers' layout") from None
    if dim % HEAD_DIM:
        raise UserError(str(where), f"has a width of {dim}, which heads of {HEAD_DIM} channels do not divide")
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": tuple(patch),
        "num_attention_heads": dim // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "in_channels": channels,
        "out_channels": out,
        "text_dim": text,
        "freq_dim": freq,
        "ffn_dim": ffn,
        "num_layers": len(blocks),
        "cross_attn_norm": "blocks.0.norm3.weight" in plain,
        "image_dim": plain["img_emb.proj.1.weight"][0] if "img_emb.proj.1.weight" in plain else None,
    }
