"""Networks in diffusers' layout, read weight by weight. A Wan2.1 transformer becomes a student."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from anyflow_train.errors import UserError
from anyflow_train.models.build import build_empty
from anyflow_train.models.embeddings import resized_patch
from anyflow_train.models.far_transformer import AnyFlowFARTransformer3DModel
from anyflow_train.models.transformer import AnyFlowTransformer3DModel

SHARED_CONFIG = (
    "patch_size",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "text_dim",
    "freq_dim",
    "ffn_dim",
    "num_layers",
    "cross_attn_norm",
    "eps",
    "rope_max_seq_len",
)
"""Constructor arguments that Wan2.1's transformer and the student have in common."""

_ONLY_VALUE = {
    "qk_norm": "rms_norm_across_heads",
    "added_kv_proj_dim": None,
    "image_dim": None,
    "pos_embed_seq_len": None,
}
"""What the other arguments of Wan2.1's transformer must be: a student has no place for anything else."""

STUDENT_TIMES = {"gate_value": 0.25, "deltatime_type": "r"}
"""How a student of a Wan2.1 transformer takes its second time, unless something else is asked for."""

TEACHER_TIMES = {"gate_value": 0.0, "deltatime_type": "r"}
"""At gate 0 the network has no second time: it is the Wan2.1 transformer itself."""

CAUSAL = {
    "full_chunk_limit": 3,
    "chunk_partition": (1, 3, 3, 3, 3, 3, 3, 2),
    "compressed_patch_size": (1, 4, 4),
}
"""How a causal student knows its chunks, unless something else is asked for."""

TIME, DELTA = "condition_embedder.time_embedder.", "condition_embedder.delta_embedder."
PATCH, FAR = "patch_embedding.", "far_patch_embedding."
_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class PretrainedWeights:
    """The weights of a network.

    Attributes:
        arguments: of the network's constructor; `models.build.network_class` says the class.
        tensors: model name -> reads that weight. Nothing has been read yet. The weights that only a causal network has
            may be absent: they are made of the others.
    """

    arguments: Mapping[str, Any]
    tensors: Mapping[str, Callable[[], Tensor]]

    def read(self, name: str) -> Tensor:
        """One weight, float32, on the CPU."""
        if name not in self.tensors and name.startswith(FAR):
            weight = self.read(name.replace(FAR, PATCH))
            return resized_patch(weight, self.arguments["compressed_patch_size"]) if weight.ndim > 1 else weight
        return self.tensors[name]().float()


def open_pretrained(
    source: str | Path,
    times: Mapping[str, Any] | None = None,
    causal: Mapping[str, Any] | None = None,
    of_wan: Mapping[str, Any] = STUDENT_TIMES,
) -> PretrainedWeights:
    """Open a Wan2.1 or AnyFlow pipeline folder, transformer folder or hub id.

    Args:
        source: what to open; its own config says what it is.
        times: `gate_value` and `deltatime_type` that the network must have; None: its own.
        causal: asks for a causal network, with any of the arguments in `CAUSAL`. Those of a causal checkpoint are its
            own; one that is given must be equal, except for the partition, which is that of the clips. None: as it is.
        of_wan: `gate_value` and `deltatime_type` of a network made of a Wan2.1 transformer, where `times` is None.

    Raises:
        UserError: there is no such network, it is of another kind, its keys do not fit, or its times or chunks are
            others.
    """
    place, arguments, kind = describe_source(source, times, causal, of_wan)
    files, network = _open_files(source, place), build_empty(arguments)
    is_wan = kind == WanTransformer3DModel.__name__
    tensors, left = {}, set(files)
    for name, parameter in network.named_parameters():
        if name.startswith(FAR) and kind != type(network).__name__:
            continue  # made of the other patch embedding
        stored = name.replace(DELTA, TIME) if is_wan else name
        if stored not in files:
            raise UserError(str(source), f"lacks the weight {stored}")
        shape = tuple(files[stored].get_slice(stored).get_shape())
        if shape != tuple(parameter.shape):
            raise UserError(str(source), f"{stored} has shape {shape}, but its config says {tuple(parameter.shape)}")
        tensors[name] = partial(files[stored].get_tensor, stored)
        left.discard(stored)
    if left:
        raise UserError(str(source), f"holds {min(left)}, for which the network has no place")
    return PretrainedWeights(arguments, tensors)


def describe_source(
    source: str | Path,
    times: Mapping[str, Any] | None = None,
    causal: Mapping[str, Any] | None = None,
    of_wan: Mapping[str, Any] = STUDENT_TIMES,
) -> tuple[str | None, dict[str, Any], str]:
    """The subfolder that holds the transformer, the constructor's arguments of the network, the stored class's name.

    Arguments and errors are those of `open_pretrained`; no weight is read.
    """
    place, config = locate(source)
    kind = str(config.get("_class_name"))
    chunks = {} if causal is None else {**CAUSAL, **causal}
    if kind == WanTransformer3DModel.__name__:
        _check_text_to_video(source, config)
        own = {name: config[name] for name in SHARED_CONFIG if name in config}
        return place, {**own, **(of_wan if times is None else times), **chunks}, kind
    # If a config does not say a time, it is the constructor's default.
    own = {**STUDENT_TIMES, **{name: value for name, value in config.items() if not name.startswith("_")}}
    _check_same(source, times or {}, own)
    if kind == AnyFlowTransformer3DModel.__name__:
        return place, {**own, **chunks}, kind
    if kind != AnyFlowFARTransformer3DModel.__name__:
        raise UserError(str(source), f"holds a {kind}; name a Wan2.1 or AnyFlow transformer")
    own, given = {**CAUSAL, **own}, dict(causal or {})
    partition = given.pop("chunk_partition", own["chunk_partition"])  # of the clips, not of the weights
    _check_same(source, given, own)
    return place, {**own, "chunk_partition": _plain(partition)}, kind


def locate(source: str | Path) -> tuple[str | None, dict[str, Any]]:
    """The subfolder of a source that holds the transformer (None: the source itself), and its config."""
    path = Path(source)
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or path.parts[:1] in [(".",), ("..",)]):
        raise UserError(str(source), "is neither a folder nor a hub id (owner/name)")
    for place in ("transformer", None):
        if path.is_dir() and not (path / (place or "") / "config.json").is_file():
            continue
        try:
            config: Any = AnyFlowTransformer3DModel.load_config(source, subfolder=place)
            return place, dict(config)
        except OSError as error:
            reason = str(error).splitlines()[0]
            if path.is_dir():
                raise UserError(str(source), f"its config cannot be read: {reason}") from error
    if path.is_dir():
        raise UserError(str(source), "holds neither transformer/config.json nor config.json")
    raise UserError(str(source), f"no transformer can be loaded from the hub under this name: {reason}")


def _check_same(source: str | Path, given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises UserError: something is asked for that is otherwise in the source's config."""
    for name, wanted in given.items():
        if _plain(own[name]) != _plain(wanted):
            raise UserError(str(source), f"was made with {name} = {_plain(own[name])!r}, and must be run with it")


def _plain(value: Any) -> Any:
    """Lists, which JSON makes of tuples, as tuples."""
    return tuple(value) if isinstance(value, list) else value


def _check_text_to_video(source: str | Path, config: Mapping[str, Any]) -> None:
    for name, wanted in _ONLY_VALUE.items():
        if config.get(name, wanted) != wanted:
            raise UserError(
                str(source),
                f"has {name} = {config[name]!r}; a student can only start from a Wan2.1 text-to-video transformer, "
                f"where it is {wanted!r} (image-to-video checkpoints have key and value projections without a place)",
            )


def _open_files(source: str | Path, place: str | None) -> dict[str, Any]:
    """The open file of every weight, by the weight's name."""
    folder = Path(source) if Path(source).is_dir() else _download(str(source), place)
    folder = folder / (place or "")
    index = folder / f"{_FILE}.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {_FILE}
    try:
        files = [safe_open(folder / name, framework="pt") for name in sorted(names)]
    except OSError as error:
        raise UserError(str(source), f"its weights cannot be read: {error}") from error
    return {key: file for file in files for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


def _download(source: str, place: str | None) -> Path:
    prefix = f"{place}/" if place else ""
    return Path(snapshot_download(source, allow_patterns=[f"{prefix}*.safetensors", f"{prefix}*.json"]))
