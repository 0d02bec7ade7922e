"""A run of seconds: random latents in shards, a student of a few thousand parameters, and processes that train it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from anyflow_train.config.run import RunConfig
from anyflow_train.data.manifest import PromptTexts
from anyflow_train.data.shards import Sample
from anyflow_train.models.build import build_network
from anyflow_train.training import run as training
from anyflow_train.training.checkpoints import writing as checkpoint_writer
from anyflow_train.training.checkpoints.reading import checkpoint_name, list_checkpoints, read_info
from anyflow_train.training.engine import ReplicatedEngine
from tests.shards import describe, write_shards

SHAPE = (2, 4, 4, 4)
TEXT_DIM = 8


def write_latents(folder: Path, samples: int = 20, poison: tuple[int, ...] = (), frames: int = SHAPE[0]) -> Path:
    """Shards of random latents; the poisoned ones are finite, but their squares are not."""
    generator = torch.Generator().manual_seed(0)
    shape = (frames, *SHAPE[1:])

    def produce() -> Iterator[Sample]:
        for number in range(samples):
            scale = 1e30 if number in poison else 1.0
            latents = scale * torch.randn(shape, generator=generator)
            yield Sample(f"clip-{number:03d}", latents, torch.randn(3, TEXT_DIM, generator=generator), f"clip {number}")

    manifest = describe(shape, TEXT_DIM, longest_text=3).model_copy(update={"validation_prompts": ("clip",)})
    texts = PromptTexts(torch.zeros(1, TEXT_DIM), (torch.ones(2, TEXT_DIM),))
    return write_shards(folder, [produce()], manifest, texts)


def write_networks(folder: Path) -> None:
    """`folder/network` and `folder/teacher`: two networks of the shape of `settings`, with other weights."""
    architecture = {**settings(folder)["student"]["architecture"], "gate_value": 0.25}
    for name, seed in (("network", 3), ("teacher", 4)):
        build_network(architecture, seed, 0.03).save_pretrained(folder / name)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A stage-1 run of 8 steps on `folder/shards`; dotted keys change it (`engine__micro_batch=2`)."""
    config: dict[str, Any] = {
        "name": "run",
        "out": str(folder),
        "steps": 8,
        "log_every": 1,
        "student": {
            "architecture": {
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "in_channels": SHAPE[1],
                "out_channels": SHAPE[1],
                "text_dim": TEXT_DIM,
                "freq_dim": 16,
                "ffn_dim": 32,
                "num_layers": 1,
                "rope_max_seq_len": 16,
            },
            "time_frequency_limit": 0.03,
        },
        "objective": {"kind": "flow_map", "derivative_network": "student"},
        "optimizer": {"lr": 1e-2, "warmup_steps": 3, "ema": {"decay": 0.9, "start_step": 3}},
        "data": {
            "shards": str(folder / "shards"),
            "frames": 5,
            "height": 32,
            "width": 32,
            "text_lengths": [4, 8],
            "workers": 1,
        },
        "engine": {"device": "cpu", "precision": "fp32", "global_batch": 8, "micro_batch": 4, "threads": 1},
        "checkpoint": {"every": 2, "keep": 2},
        "evaluation": {"every": 0},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        node = config
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return config


def on_policy(folder: Path, **changes: Any) -> dict[str, Any]:
    """A stage-2 run: the same, and the fake score's update after the student's; writes the networks that it needs."""
    write_networks(folder)
    options = {
        "on_policy": {"kind": "distribution_matching", "calls": [2], "fake_score": {"init": str(folder / "teacher")}},
        "student__init": str(folder / "network"),
        "student__time_frequency_limit": None,
        "teacher": {"source": str(folder / "teacher"), "codec": "none"},
    }
    return settings(folder, **options, **changes)


def causal(config: dict[str, Any]) -> dict[str, Any]:
    """Return a run with a causal student, on clips of three latent frames: one or two noised, or two after context."""
    student = config["student"]
    architecture = {**student["architecture"], "causal": {"chunk_partition": [1, 1, 1], "full_chunk_limit": 2}}
    return {
        **config,
        "student": {**student, "architecture": architecture},
        "data": {**config["data"], "frames": 9},
        # Often enough for a run of a few steps to have all of it.
        "context": {"long_share": 0.5, "bidirectional_probability": 0.4},
    }


def train(config: dict[str, Any]) -> Path:
    """Train in this process. Returns the run directory."""
    decoded = RunConfig.model_validate(config)
    training.run(decoded)
    return Path(decoded.out) / decoded.name


def final_tensors(run: Path, step: int | None = None) -> dict[str, Tensor]:
    """Read all tensors of the newest checkpoint, or of that of a step: weights, averages, Adam's moments."""
    files = sorted(_checkpoint(run, step).glob("*.safetensors"))
    return {f"{file.name}: {name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_equal_runs(run: Path, other: Path, step: int | None = None) -> None:
    """Compare two runs at their ends, or after a step that both have saved: weights, averages and moments bit for bit,
    Adam's step count, the step, and the position in the data.
    """
    tensors, others = final_tensors(run, step), final_tensors(other, step)
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    infos = [read_info(_checkpoint(path, step)) for path in (run, other)]
    assert infos[0].adam_steps == infos[1].adam_steps
    assert infos[0].state.step == infos[1].state.step
    assert infos[0].state.data_position == infos[1].state.data_position


def _checkpoint(run: Path, step: int | None) -> Path:
    found = list_checkpoints(run / "checkpoints")
    return found[-1] if step is None else next(path for path in found if path.name == checkpoint_name(step))


def train_with_log(config: dict[str, Any], log: Path) -> None:
    """Train with both outputs in a file."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    train(config)


def train_and_die(config: dict[str, Any], place: str, count: int) -> None:
    """Train, and kill this process (SIGKILL) at the `count`-th call of a place: `backward`, `step` or `write`."""
    owner, name = {
        "backward": (ReplicatedEngine, "backward"),
        "step": (ReplicatedEngine, "step"),
        "write": (checkpoint_writer, "write_synced"),
    }[place]
    original, calls = getattr(owner, name), 0

    def deadly(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(owner, name, deadly)
    train(config)


def in_process(target: Any, *arguments: Any) -> BaseProcess:
    """Start a function in a new process, forked from a clean one in which the imports are done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process
