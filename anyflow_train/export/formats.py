"""Formats of an export: writing and checking of each of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.schedulers.scheduling_flow_map_euler_discrete import FlowMapEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from anyflow_train.config.commands import ExportConfig
from anyflow_train.errors import UserError
from anyflow_train.export import verify
from anyflow_train.export.lora import adapters, reload_lora, write_lora
from anyflow_train.export.parts import copy_parts, pipeline_index, read_json, resolve_folder, write_index
from anyflow_train.export.weights import stock_class, stored, to_wan, write_network
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
        source = self.config.codec or self.trained.codec
        if source is None:
            problem = (
                "is not set, and the run has no teacher.source or teacher.codec; name the pipeline folder of its VAE"
            )
            raise UserError("codec", f"{problem} and text encoder")
        return resolve_folder(source)


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
    transformer = stock_class(job.network.config).__name__
    pipeline = "AnyFlowPipeline" if probe.chunks is None else "AnyFlowFARPipeline"
    write_index(job.folder, pipeline_index(source, pipeline, transformer, FlowMapEulerDiscreteScheduler.__name__))
    return max(difference, verify.check_pipeline(job.folder, probe, expected, job.config.shift, job.tolerance))


def export_transformer(job: Job) -> float:
    """Write the transformer alone. Returns the relative difference of its outputs."""
    return _write_student(job, job.folder, verify.Probe.of(job.network.config))


def export_lora(job: Job) -> float:
    """Write the adapters alone, and compare them on the base that the run started from.

    Returns:
        Relative difference between the outputs and the trained model's.
    """
    factors = adapters(job.network, job.config.precision)
    probe = verify.Probe.of(job.network.config)
    write_lora(job.folder, factors)
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
    merged: Any = merge_lora(job.network)
    wan: Any = to_wan(merged)
    state = stored(wan.state_dict(), job.config.precision)
    write_network(WanTransformer3DModel, job.folder / "transformer", wan.config, state, job.config.max_shard_gib)
    reloaded: Any = WanTransformer3DModel.from_pretrained(job.folder / "transformer", dtype=torch.float32)
    verify.check_weights(reloaded, state)
    difference = verify.check_outputs("the teacher", verify.wan_outputs(reloaded, probe), expected, job.tolerance)
    copy_parts(source, job.folder)
    scheduler = _wan_scheduler(source, job)
    index = pipeline_index(source, "WanPipeline", WanTransformer3DModel.__name__, scheduler)
    write_index(job.folder, {**index, "boundary_ratio": None, "expand_timesteps": False, "transformer_2": [None, None]})
    verify.check_index(job.folder)
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
    state = stored(merged.state_dict(), job.config.precision)
    stock = stock_class(merged.config)
    write_network(stock, folder, merged.config, state, job.config.max_shard_gib)
    reloaded: Any = stock.from_pretrained(folder, dtype=torch.float32)
    verify.check_weights(reloaded, state)
    return verify.check_outputs("the transformer", verify.flow_map_outputs(reloaded, probe), expected, job.tolerance)


def _wan_scheduler(source: Path, job: Job) -> str:
    """Copy the scheduler of the codec folder, or write an Euler scheduler if it has none. Returns its class."""
    target = job.folder / "scheduler"
    if (source / "scheduler").is_dir():
        shutil.copytree(source / "scheduler", target)
    else:
        FlowMatchEulerDiscreteScheduler(shift=job.config.shift).save_pretrained(target)
    return read_json(target / "scheduler_config.json")["_class_name"]
