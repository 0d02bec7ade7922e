"""Runs without training: a checkpoint with random weights of a student that started from a small Wan network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from anyflow_train.config.run import RunConfig
from anyflow_train.export.parts import write_index
from anyflow_train.models.adapters import trainable_parameters
from anyflow_train.training.checkpoints.state import TrainState
from anyflow_train.training.checkpoints.writing import save_checkpoint
from anyflow_train.training.networks import start_student

TINY_WAN = Path(__file__).parents[2] / "assets" / "tiny-wan"
LORA = {"kind": "lora", "rank": 3, "alpha": 6.0}
WITH_DELTA = {**LORA, "targets": ["attn1.to_q", "ffn.net.2", "time_embedder.linear_1", "delta_embedder.linear_2"]}
FULL = {"kind": "full"}
ARCHITECTURE = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 32,
    "ffn_dim": 40,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}


def make_base(folder: Path, architecture: dict[str, Any] = ARCHITECTURE) -> Path:
    """Make a whole Wan2.1 pipeline folder with the embedded codec and a random transformer."""
    torch.manual_seed(0)
    for part in ("tokenizer", "text_encoder", "vae", "scheduler"):
        shutil.copytree(TINY_WAN / part, folder / part)
    WanTransformer3DModel(**architecture).save_pretrained(folder / "transformer")
    write_index(folder, "WanPipeline", boundary_ratio=None, expand_timesteps=False, transformer_2=[None, None])
    return folder


CHUNKS = {"chunk_partition": [1, 1, 1], "full_chunk_limit": 2}


def make_run(
    folder: Path,
    adapter: dict[str, Any],
    gate: float = 0.25,
    deltatime: str = "r",
    causal: dict[str, Any] | None = None,
    init: str | None = "base",
    architecture: dict[str, Any] | None = None,
    kind: str = "flow_map",
    **context: float,
) -> Path:
    """Make a run directory with one checkpoint at step 7, with different EMA and raw weights.

    Clips have 5 frames, those of causal students 9.
    """
    base, shape = folder / (init or "base"), {**ARCHITECTURE, **(architecture or {})}
    if not base.exists():
        make_base(base, shape)
    config = RunConfig.model_validate(
        {
            "name": "run",
            "out": str(folder),
            "steps": 10,
            "student": {
                "init": init and str(base),
                "architecture": {**shape, "causal": causal},
                "gate_value": gate,
                "deltatime_type": deltatime,
                "adapter": adapter,
            },
            "teacher": {"source": str(base)},
            "objective": {"kind": kind},
            "context": context,
            "data": {"shards": "shards", "frames": 9 if causal else 5, "height": 32, "width": 32},
        }
    )
    weights = trainable_parameters(start_student(config.student, seed=0))
    generator = torch.Generator().manual_seed(1)

    def moved(scale: float) -> dict[str, torch.Tensor]:
        return {k: w.detach() + scale * torch.randn(w.shape, generator=generator) for k, w in weights.items()}

    groups = {"weights": moved(0.1).items(), "ema": moved(0.05).items()}
    save_checkpoint(folder / "run" / "checkpoints", config, TrainState(step=7), {"student": 7}, groups)
    return folder / "run"
