"""Overrides of a run of seconds: the tiny experiment with a smaller student on random latents, without a teacher."""

from __future__ import annotations

from tests.training.helpers import SHAPE, TEXT_DIM

SHORT = (
    "experiment=tiny",
    "objective=flow_map",
    "student.init=null",
    "student.time_frequency_limit=0.03",
    "student.architecture.num_attention_heads=2",
    "student.architecture.attention_head_dim=12",
    f"student.architecture.in_channels={SHAPE[1]}",
    f"student.architecture.out_channels={SHAPE[1]}",
    f"student.architecture.text_dim={TEXT_DIM}",
    "student.architecture.freq_dim=16",
    "student.architecture.ffn_dim=32",
    "student.architecture.num_layers=1",
    "teacher=none",
    "objective.velocity=data",
    "evaluation=none",
    "data.frames=5",
    "data.height=32",
    "data.width=32",
    "data.text_lengths=[4]",
    "engine.global_batch=4",
    "engine.micro_batch=4",
    "engine.threads=1",
    "optimizer.warmup_steps=0",
    "steps=2",
)
