"""What a source of a network holds, read from its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from anyflow_train.errors import UserError
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

TIMES = {"gate_value": 0.25, "deltatime_type": "r"}
"""How a student of a Wan2.1 transformer takes its second time, where nothing else is asked for."""

CAUSAL = {
    "full_chunk_limit": 3,
    "chunk_partition": (1, 3, 3, 3, 3, 3, 3, 2),
    "compressed_patch_size": (1, 4, 4),
}
"""How a causal student knows its chunks, where nothing else is asked for."""


def network_class(arguments: Mapping[str, Any]) -> type:
    """`AnyFlowFARTransformer3DModel` for constructor arguments with chunks, else `AnyFlowTransformer3DModel`."""
    return AnyFlowFARTransformer3DModel if "chunk_partition" in arguments else AnyFlowTransformer3DModel


def describe_source(
    source: str | Path,
    gate_value: float | None,
    deltatime_type: str | None,
    causal: Mapping[str, Any] | None = None,
) -> tuple[str | None, dict[str, Any], str]:
    """The subfolder that holds the transformer, the constructor's arguments of the student, the stored class's name.

    The class of the student is `network_class` of its arguments. The other arguments here, and the errors, are those of
    `anyflow_train.models.wan.load_network`; no weight is read.
    """
    place, config = locate(source)
    kind = str(config.get("_class_name"))
    if kind == WanTransformer3DModel.__name__:
        problem = unlike_text_to_video(config)
        if problem is not None:
            raise UserError(str(source), problem)
        given = {"gate_value": gate_value, "deltatime_type": deltatime_type}
        times = {name: TIMES[name] if value is None else value for name, value in given.items()}
        own = {name: config[name] for name in SHARED_CONFIG if name in config}
        return place, {**own, **times, **chunk_arguments(causal)}, kind
    is_causal = kind == AnyFlowFARTransformer3DModel.__name__
    if not is_causal and kind != AnyFlowTransformer3DModel.__name__:
        raise UserError(str(source), f"holds a {kind}, where a Wan2.1 or AnyFlow transformer is wanted")
    if is_causal and causal is None:
        raise UserError(str(source), "is a causal network, and was asked for as one that makes all frames together")
    # What a config does not say is the constructor's default.
    own = {**TIMES, **{name: value for name, value in config.items() if not name.startswith("_")}}
    _check_same(source, {"gate_value": gate_value, "deltatime_type": deltatime_type}, own)
    if not is_causal:
        return place, {**own, **chunk_arguments(causal)}, kind
    own, given = {**CAUSAL, **own}, dict(causal or {})
    partition = given.pop("chunk_partition", own["chunk_partition"])  # of the clips, not of the weights
    _check_same(source, given, own)
    return place, {**own, "chunk_partition": partition}, kind


def chunk_arguments(causal: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a causal network's constructor takes beside, defaults filled in; nothing for None."""
    return {} if causal is None else {**CAUSAL, **causal}


def _check_same(source: str | Path, given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises UserError: something is asked for that is otherwise in the source's config."""
    for name, wanted in given.items():
        if wanted is not None and _plain(own[name]) != _plain(wanted):
            raise UserError(str(source), f"was made with {name} = {_plain(own[name])!r}, and must be run with it")


def _plain(value: Any) -> Any:
    """Lists, which JSON makes of tuples, as tuples."""
    return tuple(value) if isinstance(value, list) else value


def locate(source: str | Path) -> tuple[str | None, dict[str, Any]]:
    """The subfolder of a source that holds the transformer (None: the source itself), and its config."""
    path = Path(source)
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or path.parts[:1] in [(".",), ("..",)]):
        raise UserError(str(source), "is neither a folder nor a hub id (owner/name)")
    for place in ("transformer", None):
        if path.is_dir() and not (path / (place or "") / "config.json").is_file():
            continue
        try:
            return place, _read_config(source, place)
        except OSError as error:
            reason = str(error).splitlines()[0]
            if path.is_dir():
                raise UserError(str(source), f"its config cannot be read: {reason}") from error
    if path.is_dir():
        raise UserError(str(source), "holds neither transformer/config.json nor config.json")
    raise UserError(str(source), f"no transformer can be loaded from the hub under this name: {reason}")


def _read_config(source: str | Path, place: str | None) -> dict[str, Any]:
    config: Any = AnyFlowTransformer3DModel.load_config(source, subfolder=place)
    return dict(config)


def unlike_text_to_video(config: Mapping[str, Any]) -> str | None:
    """Why a config of Wan2.1's transformer is not that of a text-to-video one; None if it is."""
    for name, wanted in _ONLY_VALUE.items():
        if config.get(name, wanted) != wanted:
            return (
                f"has {name} = {config[name]!r}; a student can only start from a Wan2.1 text-to-video transformer, "
                f"where it is {wanted!r} (image-to-video checkpoints have key and value projections without a place)"
            )
    return None
