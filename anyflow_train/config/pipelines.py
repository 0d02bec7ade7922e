"""Checks that a student can be built from a pipeline in diffusers' layout. Reads its JSON files only, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from anyflow_train.config.derived import SPATIAL_FACTOR, TEMPORAL_FACTOR
from anyflow_train.errors import UserError
from anyflow_train.files import FileName, inside, read_json, regular

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX, VAE, SCHEDULER = "model_index.json", "vae/config.json", "scheduler/scheduler_config.json"
PIPELINES = ("WanPipeline", "AnyFlowPipeline", "AnyFlowFARPipeline")
SUPPORTED = (
    "supported are Wan2.1 text-to-video pipelines (WanPipeline with one transformer, flow matching, and a VAE that "
    f"compresses {SPATIAL_FACTOR}x in height and width and {TEMPORAL_FACTOR}x in time) and AnyFlow pipelines"
)

ReadJson = Callable[[str], Mapping[str, Any]]
"""Reads a JSON file of a pipeline by its name; gives an empty mapping if the pipeline does not have it."""


def check_pipeline(source: str | Path, transformer: Mapping[str, Any], read: ReadJson) -> None:
    """Check that a pipeline is one model that a student can be built from. Files that it does not have are not checked.

    Args:
        source: folder or hub id, for errors.
        transformer: config of its transformer.

    Raises:
        UserError: names the first difference, and what is supported.
    """
    for problem in _problems(transformer, read(INDEX), read(VAE), read(SCHEDULER)):
        raise UserError(str(source), f"{problem}; {SUPPORTED}")


def folder_reader(transformer: Path) -> ReadJson:
    """Read the JSON files of the pipeline folder around a transformer's folder, if there is one.

    The returned function raises UserError if a file is damaged, because half of a model could not be told from a whole.
    """
    root = transformer.resolve().parent
    return lambda name: read_intact(root / name) if (root / INDEX).is_file() else {}


class _Index(BaseModel):
    weight_map: dict[str, FileName]


def weight_files(transformer: Path) -> list[Path]:
    """List the weight files of a transformer's folder.

    Raises:
        UserError: the index is damaged, or a file does not exist, is not a regular file, or leads out of the folder.
    """
    index = transformer / f"{WEIGHTS}.index.json"
    try:
        names = _Index.model_validate_json(index.read_bytes()).weight_map.values() if index.is_file() else [WEIGHTS]
        return [regular(inside(transformer, name)) for name in sorted(set(names))]
    except ValidationError as error:
        raise UserError(str(index), f"does not map weights to files: {error.errors()[0]['msg']}") from None
    except OSError as error:
        name = str(error.filename or transformer)
        raise UserError(name, f"cannot be read ({error.strerror}); copy or download it again") from None


def read_intact(path: Path) -> dict[str, Any]:
    """Read a JSON object. It is empty if there is no such file. Raises UserError if the file is damaged."""
    try:
        return dict(read_json(path)) if path.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(str(path), f"cannot be read ({error}); copy or download it again") from None


def _problems(
    transformer: Mapping[str, Any], index: Mapping[str, Any], vae: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> Iterator[str]:
    kind, boundary = index.get("_class_name", PIPELINES[0]), index.get("boundary_ratio")
    if boundary is not None or any(index.get("transformer_2") or ()):
        yield f"has two transformers (transformer_2, boundary_ratio={boundary}), each only half of the model"
    if index.get("expand_timesteps"):
        yield "has expand_timesteps=true: it takes one time per token"
    if kind not in PIPELINES:
        yield f"is a {kind}"
    given, made = transformer.get("in_channels", 16), transformer.get("out_channels", 16)
    if given != made:
        yield f"has a transformer with in_channels={given} and out_channels={made}: it takes more than noisy latents"
    factors = {"scale_factor_spatial": SPATIAL_FACTOR, "scale_factor_temporal": TEMPORAL_FACTOR, "z_dim": given}
    wanted = {"_class_name": "AutoencoderKLWan", **factors}
    for name, value in wanted.items() if vae else ():
        # Wan2.1's VAE is older than the keys of the factors.
        if vae.get(name, value) != value:
            yield f"has a VAE with {name}={vae[name]} instead of {value}"
    prediction = scheduler.get("prediction_type", "flow_prediction")
    if prediction != "flow_prediction":
        yield f"has the scheduler {scheduler.get('_class_name')} with prediction_type={prediction}"
