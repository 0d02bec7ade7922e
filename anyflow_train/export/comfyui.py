"""Files for ComfyUI: the network or its adapters under Wan's original names, and a custom node for the second time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyflow_train.config.original import HEAD_DIM, original_name
from anyflow_train.errors import UserError
from anyflow_train.export.weights import Precision, stored
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.pretrained import DELTA, TIME

NODE = Path(__file__).parent / "comfyui_node"
NODE_FOLDER = "custom_nodes/anyflow"
LAST = f"{TIME}linear_2"


def check_playable(network: Backbone) -> None:
    """Check that ComfyUI's Wan2.1 network and the node can play a student.

    Raises:
        UserError: it is causal, its second time is the length of the jump, or its heads have another width.
    """
    config, problem = network.config, None
    if "chunk_partition" in config:
        problem = "a causal student, which ComfyUI's network is not"
    elif config.deltatime_type != "r":
        problem = "a student with student.deltatime_type=t-r, whose second time is not 0 at the end of a clip"
    elif config.attention_head_dim != HEAD_DIM:
        problem = f"heads of {config.attention_head_dim} channels; ComfyUI takes every head to have {HEAD_DIM}"
    if problem:
        raise UserError("format", f"ComfyUI cannot play {problem}; use format=pipeline")


def folded(state: Mapping[str, Tensor], network: Backbone) -> dict[str, Tensor]:
    """Fold the second time into the time embedding's last layer, as it is at r = 0.

    Args:
        state: float32 weights of the network, by model name.
        network: the network, for its gate g and its features of times.

    Returns:
        The weights without those of the second time embedder: `W' = (1 - g) W`, `b' = (1 - g) b + g E_delta(0)`.
    """
    gate, kept = float(network.config.gate_value), {k: w for k, w in state.items() if not k.startswith(DELTA)}
    first, bias, second, last_bias = (state[f"{DELTA}linear_{n}.{part}"] for n in (1, 2) for part in ("weight", "bias"))
    features = network.condition_embedder.timesteps_proj(torch.zeros(1)).to(first.dtype)
    at_zero = torch.nn.functional.silu(features @ first.T + bias) @ second.T + last_bias
    kept[f"{LAST}.weight"] = (1 - gate) * state[f"{LAST}.weight"]
    kept[f"{LAST}.bias"] = (1 - gate) * state[f"{LAST}.bias"] + gate * at_zero[0]
    return kept


def write_model(file: Path, state: Mapping[str, Tensor], precision: Precision, metadata: Mapping[str, Any]) -> None:
    """Write weights by model name as one file under Wan's original names."""
    weights = {original_name(name): weight for name, weight in stored(state, precision).items()}
    _save(weights, file, metadata)


def write_lora(
    file: Path,
    factors: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    precision: Precision,
    metadata: Mapping[str, Any],
) -> None:
    """Write adapters under the names that ComfyUI takes, `diffusion_model.<original name>`.

    The gate scales the whole last layer of the time embedding, which no adapter can: the file contains the difference
    of that layer (`.diff`, `.diff_b`). The second time embedder is left to the node.

    Args:
        factors: adapters by `transformer.<model name>.lora_A.weight` and `.lora_B.weight`.
        state: weights of the student with the second time folded in.
        base: weights of the base, by model name.
    """
    skipped = (DELTA, LAST)
    kept = {name.removeprefix("transformer."): factor for name, factor in factors.items()}
    kept = {name: factor for name, factor in kept.items() if not name.startswith(skipped)}
    for part, ending in (("weight", "diff"), ("bias", "diff_b")):
        kept[f"{LAST}.{ending}"] = state[f"{LAST}.{part}"] - base[f"{LAST}.{part}"]
    weights = {f"diffusion_model.{original_name(name)}": w for name, w in stored(kept, precision).items()}
    _save(weights, file, metadata)


def reader(file: Path, base: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    """Return a function that reads weights of the base with a file of `write_lora` applied by ComfyUI's rules."""
    stored = load_file(file)

    def read(name: str) -> Tensor:
        path, _, part = name.rpartition(".")
        key, weight = f"diffusion_model.{original_name(path)}", base[name]
        if difference := {"weight": f"{key}.diff", "bias": f"{key}.diff_b"}.get(part):
            weight = weight + stored[difference].float() if difference in stored else weight
        if part == "weight" and f"{key}.lora_B.weight" in stored:
            weight = weight + stored[f"{key}.lora_B.weight"].float() @ stored[f"{key}.lora_A.weight"].float()
        return weight

    return read


def write_node(folder: Path, name: str, state: Mapping[str, Tensor], network: Backbone) -> None:
    """Write the custom node, with the second time embedder as `<name>.safetensors` in float32.

    Args:
        state: weights of the network with its adapters merged, by model name.
    """
    node = folder / NODE_FOLDER
    node.mkdir(parents=True)
    shutil.copyfile(NODE / "__init__.py", node / "__init__.py")
    weights = {key: weight for key, weight in state.items() if key.startswith(DELTA)}
    renamed = {
        key.replace(DELTA, "delta_embedding.").replace("linear_1", "0").replace("linear_2", "2"): w
        for key, w in weights.items()
    }
    _save(renamed, node / f"{name}.safetensors", {"gate_value": float(network.config.gate_value)})


def _save(weights: dict[str, Tensor], file: Path, metadata: Mapping[str, Any]) -> None:
    save_file(weights, file, metadata={"format": "pt", **{key: str(value) for key, value in metadata.items()}})
