"""Read networks in diffusers' layout, one weight at a time. A Wan2.1 transformer becomes a student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from anyflow_train.config import original
from anyflow_train.config.network import STUDENT_TIMES, Causal, plain
from anyflow_train.config.pipelines import ReadJson, check_pipeline, folder_reader, weight_files
from anyflow_train.errors import UserError, reason_of
from anyflow_train.files import networks_inside, parse_json
from anyflow_train.models.build import build_described
from anyflow_train.models.embeddings import resized_patch
from anyflow_train.models.far_transformer import AnyFlowFARTransformer3DModel
from anyflow_train.models.transformer import AnyFlowTransformer3DModel
from anyflow_train.models.weight_files import open_weights, read_weight

Given = Mapping[str, Any]
"""Arguments of a network's constructor."""

_ONLY_VALUE = {
    "qk_norm": "rms_norm_across_heads",
    "added_kv_proj_dim": None,
    "image_dim": None,
    "pos_embed_seq_len": None,
}
"""Required values of some arguments of the Wan2.1 transformer. A student supports no other values."""

SHARED_CONFIG = tuple(name for name in signature(WanTransformer3DModel).parameters if name not in _ONLY_VALUE)
"""Constructor arguments that the Wan2.1 transformer and the student share."""

TEACHER_TIMES = {"gate_value": 0.0, "deltatime_type": "r"}
"""Arguments of a teacher. At gate 0 the second time has no effect, so the network is the Wan2.1 transformer."""

CAUSAL = Causal().model_dump()
"""Default chunk arguments of a causal student."""

TIME, DELTA = "condition_embedder.time_embedder.", "condition_embedder.delta_embedder."
PATCH, FAR = "patch_embedding.", "far_patch_embedding."


@dataclass(frozen=True)
class PretrainedWeights:
    """The weights of a stored network, read on demand.

    Attributes:
        arguments: constructor arguments of the network; `models.build.network_class` gives the class.
        tensors: model name -> function that reads the weight. The second patch embedding of a causal network may be
            absent; it is then computed from the first one.
    """

    arguments: Given
    tensors: Mapping[str, Callable[[], Tensor]]

    def read(self, name: str) -> Tensor:
        """Read one weight, float32, on the CPU."""
        if name not in self.tensors and name.startswith(FAR):
            weight = self.read(name.replace(FAR, PATCH))
            return resized_patch(weight, self.arguments["compressed_patch_size"]) if weight.ndim > 1 else weight
        return self.tensors[name]().float()


def open_pretrained(
    source: str | Path,
    times: Given | None = None,
    causal: Given | None = None,
    wan_times: Given = STUDENT_TIMES,
) -> PretrainedWeights:
    """Open a Wan2.1 or AnyFlow pipeline folder, transformer folder or hub id, or weights of Wan's own repository.

    Args:
        source: folder or hub id, whose config determines the kind; or one `.safetensors` file with the names of Wan's
            own repository, as ComfyUI uses it.
        times: required `gate_value` and `deltatime_type`; None accepts those of the source.
        causal: makes the network causal, with any of the arguments in `CAUSAL`. For a causal checkpoint they must equal
            its own, except for the partition, which is a property of the clips. None keeps the kind of the source.
        wan_times: `gate_value` and `deltatime_type` for a Wan2.1 transformer, used if `times` is None.

    Raises:
        UserError: the source does not exist, is of another kind or only half of a model, has missing or unexpected
            weights, or has other times or chunks than required.
    """
    place, config = _locate(source)
    files, stored_name = None, str
    if config.get("_class_name") == original.KIND:
        files = _open_files(source, place)
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in files.items()}
        config, prefix = (
            original.architecture(shapes, source),
            original.PREFIX * min(shapes).startswith(original.PREFIX),
        )
        stored_name = lambda name: prefix + original.original_name(name)  # noqa: E731
    check_pipeline(source, config, _pipeline_reader(source, place))
    kind, arguments = config.get("_class_name"), _arguments(source, config, times, causal, wan_times)
    files, network = files or _open_files(source, place), build_described(arguments, source)
    is_wan = kind == WanTransformer3DModel.__name__
    tensors, left = {}, set(files)
    for name, parameter in network.named_parameters():
        if name.startswith(FAR) and kind != type(network).__name__:
            continue  # computed from the other patch embedding
        stored = stored_name(name.replace(DELTA, TIME) if is_wan else name)
        if stored not in files:
            raise UserError(str(source), f"has no weight {stored}, which its config requires")
        shape = tuple(files[stored].get_slice(stored).get_shape())
        if shape != tuple(parameter.shape):
            raise UserError(str(source), f"{stored} has shape {shape}, but its config says {tuple(parameter.shape)}")
        tensors[name] = partial(read_weight, files[stored], stored, source)
        left.discard(stored)
    if left:
        raise UserError(str(source), f"has the weight {min(left)}, which the network does not have")
    return PretrainedWeights(arguments, tensors)


def _arguments(source: str | Path, config: Given, times: Given | None, causal: Given | None, wan_times: Given) -> Given:
    """Return constructor arguments for the config of a source. Arguments and errors are those of `open_pretrained`."""
    kind = config.get("_class_name")
    chunks = {} if causal is None else {**CAUSAL, **causal}
    if kind == WanTransformer3DModel.__name__:
        _check_text_to_video(source, config)
        own = {name: config[name] for name in SHARED_CONFIG if name in config}
        return {**own, **(wan_times if times is None else times), **chunks}
    if kind not in (AnyFlowTransformer3DModel.__name__, AnyFlowFARTransformer3DModel.__name__):
        raise UserError(str(source), f"holds a {kind}; give a Wan2.1 or AnyFlow transformer")
    # Times that a config lacks have the constructor's defaults.
    own = {**STUDENT_TIMES, **{name: value for name, value in config.items() if not name.startswith("_")}}
    _check_same(source, times or {}, own)
    if own.get("image_dim") is not None:
        raise UserError(str(source), f"has image_dim = {own['image_dim']}, but image embeddings are not supported")
    if kind == AnyFlowTransformer3DModel.__name__:
        return {**own, **chunks}
    own, given = {**CAUSAL, **own}, dict(causal or {})
    partition = given.pop("chunk_partition", own["chunk_partition"])  # depends on the clips, not on the weights
    _check_same(source, given, own)
    return {**own, "chunk_partition": plain(partition)}


def _locate(source: str | Path) -> tuple[str | None, dict[str, Any]]:
    """Find the transformer of a source. Returns its subfolder (None for the source itself) and its config.

    Raises:
        UserError: no transformer is found, or its config cannot be read.
    """
    path = Path(source)
    if original.is_weights_file(path):
        return None, {"_class_name": original.KIND}
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or path.parts[:1] in [(".",), ("..",)]):
        raise UserError(str(source), "is neither a folder nor a hub id (owner/name)")
    for place in ("transformer", None):
        if path.is_dir() and not (path / (place or "") / "config.json").is_file():
            continue
        try:
            config: Any = AnyFlowTransformer3DModel.load_config(source, subfolder=place)
            return place, dict(config)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            problem = reason_of(error)
            if path.is_dir():
                raise UserError(str(source), f"cannot read its config: {problem}") from error
    if path.is_dir():
        problem = "contains neither transformer/config.json nor config.json"
        raise UserError(str(source), problem + networks_inside(path, "checkpoints", "transformer"))
    raise UserError(str(source), f"is no folder, and cannot be loaded from the hub: {problem}")


def _pipeline_reader(source: str | Path, place: str | None) -> ReadJson:
    if original.is_weights_file(source):
        return lambda _name: {}
    if Path(source).is_dir():
        return folder_reader(Path(source) / (place or ""))

    def read(name: str) -> Given:
        with suppress(OSError, ValueError, HfHubHTTPError):
            return parse_json(Path(hf_hub_download(str(source), name)).read_text())
        return {}

    return read


def _check_same(source: str | Path, given: Given, own: Given) -> None:
    """Check required arguments. Raises UserError if the config of the source has other values."""
    for name, wanted in given.items():
        if plain(own[name]) != plain(wanted):
            raise UserError(
                str(source), f"was trained with {name} = {plain(own[name])!r}, so it cannot use {plain(wanted)!r}"
            )


def _check_text_to_video(source: str | Path, config: Given) -> None:
    for name, wanted in _ONLY_VALUE.items():
        if config.get(name, wanted) != wanted:
            raise UserError(
                str(source),
                f"has {name} = {config[name]!r}, but a student can only start from a Wan2.1 text-to-video transformer, "
                f"which has {wanted!r} (image-to-video checkpoints have weights that a student does not have)",
            )


def _open_files(source: str | Path, place: str | None) -> dict[str, Any]:
    """Open the weight files. Returns weight name -> open file."""
    folder, alone = Path(source), original.is_weights_file(source)
    if not alone and not folder.is_dir():
        prefix = f"{place}/" if place else ""
        folder = Path(snapshot_download(str(source), allow_patterns=[f"{prefix}*.safetensors", f"{prefix}*.json"]))
    files = map(open_weights, [folder] if alone else weight_files(folder / (place or "")))
    return {key: file for file in files for key in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
