"""Which pipelines in diffusers' layout a student can be built from. Reads their JSON files only, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from anyflow_train.config.derived import SPATIAL_FACTOR, TEMPORAL_FACTOR
from anyflow_train.errors import UserError

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
    return lambda name: _read_intact(root / name) if (root / INDEX).is_file() else {}


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. It is empty if there is no such file, or the file holds anything else."""
    with suppress(UserError):
        return _read_intact(path)
    return {}


def _read_intact(path: Path) -> dict[str, Any]:
    """Read a JSON object. It is empty if there is no such file. Raises UserError if the file is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
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
