"""Formats of an export: writing and checking of each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.schedulers.scheduling_flow_map_euler_discrete import FlowMapEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from anyflow_train.config.commands import ExportConfig
from anyflow_train.config.paths import find_codec
from anyflow_train.errors import UserError
from anyflow_train.export import verify
from anyflow_train.export.lora import reload_lora, write_lora
from anyflow_train.export.parts import copy_part, copy_parts, resolve_folder, write_index
from anyflow_train.export.weights import Stock, stock_class, stored, to_wan, write_network
from anyflow_train.models.adapters import merge_lora
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.build import assemble
from anyflow_train.training.checkpoints.network_file import NetworkFile
from anyflow_train.training.weight_source import open_source


@dataclass(frozen=True)
class Job:
    """An export that is in progress.

    Attributes:
        config: config of the export.
        checkpoint: folder of the checkpoint.
        trained: contents of its `network.json`.
        network: the trained model with its adapters, on the CPU in float32.
        folder: folder to write into.
    """

    config: ExportConfig
    checkpoint: Path
    trained: NetworkFile
    network: Backbone
    folder: Path

    @property
    def tolerance(self) -> float:
        """Largest relative difference that the precision of the files can cause."""
        return verify.TOLERANCES[self.config.precision]

    def codec_folder(self) -> Path:
        """Return a local pipeline folder with tokenizer, text encoder and VAE. Raises UserError if there is none."""
        return resolve_folder(self.config.codec or find_codec(self.trained.codec))


def export_pipeline(job: Job) -> float:
    """Write an AnyFlowPipeline, or an AnyFlowFARPipeline for a causal student.

    Returns:
        Relative difference between its outputs and the trained model's.
    """
    source = job.codec_folder()
    probe = verify.Probe.of(job.network.config)
    expected = verify.two_jumps(job.network, probe, job.config.shift)
    difference = _write_student(job, job.folder / "transformer", probe)
    copy_parts(source, job.folder)
    FlowMapEulerDiscreteScheduler(shift=job.config.shift).save_pretrained(job.folder / "scheduler")
    write_index(job.folder, "AnyFlowPipeline" if probe.chunks is None else "AnyFlowFARPipeline")
    return max(difference, verify.check_pipeline(job.folder, probe, expected, job.config.shift, job.tolerance))


def export_transformer(job: Job) -> float:
    """Write the transformer alone. Returns the relative difference of its outputs."""
    return _write_student(job, job.folder, verify.Probe.of(job.network.config))


def export_lora(job: Job) -> float:
    """Write the adapters alone, and compare them on the base that the run started from.

    Returns:
        Relative difference between the outputs and the trained model's.
    """
    write_lora(job.folder, job.network, job.config.precision)
    probe = verify.Probe.of(job.network.config)
    source = open_source(job.checkpoint)
    reloaded = reload_lora(job.folder, assemble(source.arguments, source.read))
    found = verify.flow_map_outputs(reloaded, probe)
    return verify.check_outputs("the LoRA file", found, verify.flow_map_outputs(job.network, probe), job.tolerance)


def export_wan_pipeline(job: Job) -> float:
    """Write a WanPipeline of a teacher. Wan has a single time, so the network must have gate 0.

    Returns:
        Relative difference between its outputs and the trained model's.

    Raises:
        UserError: the network has a second time or is causal.
    """
    gate = job.trained.times["gate_value"]
    if gate != 0:
        problem = f"wan_pipeline needs student.gate_value=0, but this run has {gate}; use format=pipeline"
        raise UserError("format", problem)
    if "chunk_partition" in job.network.config:
        raise UserError("format", "wan_pipeline cannot contain a causal network; use format=pipeline")
    source = job.codec_folder()
    probe = verify.Probe.of(job.network.config)
    expected = verify.velocity_outputs(job.network, probe)
    reloaded = _write(job, WanTransformer3DModel, job.folder / "transformer", to_wan(merge_lora(job.network)))
    difference = verify.check_outputs("the teacher", verify.wan_outputs(reloaded, probe), expected, job.tolerance)
    copy_parts(source, job.folder)
    if (source / "scheduler").is_dir():
        copy_part(source, job.folder, "scheduler")
    else:
        FlowMatchEulerDiscreteScheduler(shift=job.config.shift).save_pretrained(job.folder / "scheduler")
    more = {"boundary_ratio": None, "expand_timesteps": False, "transformer_2": [None, None]}
    write_index(job.folder, "WanPipeline", **more)
    verify.play_clip(verify.load_pipeline(job.folder), probe)
    return difference


FORMATS: dict[str, Callable[[Job], float]] = {
    "pipeline": export_pipeline,
    "transformer": export_transformer,
    "lora": export_lora,
    "wan_pipeline": export_wan_pipeline,
}


def _write_student(job: Job, folder: Path, probe: verify.Probe) -> float:
    expected = verify.flow_map_outputs(job.network, probe)
    merged = merge_lora(job.network)
    found = verify.flow_map_outputs(merged, probe)
    verify.check_outputs("the model with LoRA merged", found, expected, verify.MERGE_TOLERANCE)
    reloaded = _write(job, stock_class(merged.config), folder, merged)
    return verify.check_outputs("the transformer", verify.flow_map_outputs(reloaded, probe), expected, job.tolerance)


def _write(job: Job, network_class: Stock, folder: Path, network: Any) -> Any:
    """Write a network as stock diffusers' network, reload it in float32, and compare the weights."""
    state = stored(network.state_dict(), job.config.precision)
    write_network(network_class, folder, network.config, state, job.config.max_shard_gib)
    reloaded = network_class.from_pretrained(folder, dtype=torch.float32)
    verify.check_weights(reloaded, state)
    return reloaded
