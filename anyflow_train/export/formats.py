"""Formats of an export: writing and checking of each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.schedulers.scheduling_flow_map_euler_discrete import FlowMapEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from anyflow_train.config.commands import ExportConfig
from anyflow_train.config.paths import find_codec
from anyflow_train.errors import UserError
from anyflow_train.export import comfyui, verify
from anyflow_train.export.card import hub_id
from anyflow_train.export.lora import added, reload_lora, trained_factors, truncated_factors, write_lora
from anyflow_train.export.parts import copy_part, copy_parts, resolve_folder, write_index
from anyflow_train.export.provenance import public_name
from anyflow_train.export.weights import Stock, stock_class, stored, to_wan, write_network
from anyflow_train.models.adapters import merge_lora
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.build import assemble
from anyflow_train.models.pretrained import DELTA, TEACHER_TIMES, TIME, open_pretrained
from anyflow_train.training.checkpoints.network_file import NetworkFile
from anyflow_train.training.checkpoints.reading import read_step
from anyflow_train.training.weight_source import base_of, open_base, open_source


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

    @cached_property
    def probe(self) -> verify.Probe:
        """Inputs for comparisons with the trained model."""
        return verify.Probe.of(self.network.config)

    @property
    def tolerance(self) -> float:
        """Largest relative difference that the precision of the files can cause."""
        return verify.TOLERANCES[self.config.precision]

    def codec_folder(self) -> Path:
        """Return a local pipeline folder with tokenizer, text encoder and VAE. Raises UserError if there is none."""
        return resolve_folder(self.config.codec or find_codec(self.trained.codec))


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        difference: relative root mean square difference between the outputs of the files and the trained model's.
        lost: share of the trained change that truncated adapters lose, in [0, 1]; None for all other exports.
    """

    difference: float
    lost: float | None = None


def export_pipeline(job: Job) -> Exported:
    """Write an AnyFlowPipeline, or an AnyFlowFARPipeline for a causal student."""
    source, probe = job.codec_folder(), job.probe
    expected = verify.two_jumps(job.network, probe, job.config.shift)
    difference = _write_student(job, job.folder / "transformer")
    copy_parts(source, job.folder)
    FlowMapEulerDiscreteScheduler(shift=job.config.shift).save_pretrained(job.folder / "scheduler")
    write_index(job.folder, "AnyFlowPipeline" if probe.chunks is None else "AnyFlowFARPipeline")
    played = verify.check_pipeline(job.folder, probe, expected, job.config.shift, job.tolerance)
    return Exported(max(difference, played))


def export_transformer(job: Job) -> Exported:
    """Write the transformer alone."""
    return Exported(_write_student(job, job.folder))


def export_lora(job: Job) -> Exported:
    """Write the adapters alone, and compare them on the base that the run started from.

    For a run that trained the whole network, the adapters are a truncated SVD of what it changed.
    """
    base, factors, lost = _adapters(job)
    write_lora(job.folder, factors, job.config.precision)
    found = verify.flow_map_outputs(reload_lora(job.folder, base), job.probe)
    approximated = _with_weights(base, added(base.state_dict(), factors))
    expected = verify.flow_map_outputs(approximated, job.probe)
    verify.check_outputs("the LoRA file", found, expected, job.tolerance)
    limit = job.tolerance if lost is None else float("inf")  # the loss of a truncation is reported, not bounded
    trained = verify.flow_map_outputs(job.network, job.probe)
    return Exported(verify.check_outputs("the LoRA file", found, trained, limit), lost)


def export_comfyui(job: Job) -> Exported:
    """Write the network as one file for ComfyUI, and the custom node for its second time."""
    comfyui.check_playable(job.network)
    merged, _ = _merge(job)
    state = merged.state_dict()
    file = job.folder / f"{job.trained.run}.safetensors"
    comfyui.write_model(file, comfyui.folded(state, merged), job.config.precision, _metadata(job))
    comfyui.write_node(job.folder, job.trained.run, state, merged)
    return Exported(_check_folded(job, merged, open_pretrained(file, TEACHER_TIMES).read))


def export_comfyui_lora(job: Job) -> Exported:
    """Write the adapters for ComfyUI, on the Wan2.1 model that the run started from, and the custom node."""
    comfyui.check_playable(job.network)
    base, factors, lost = _adapters(job)
    before = base.state_dict()
    student = _with_weights(base, added(before, factors))
    state, lora = student.state_dict(), job.trained.adapter
    folded = comfyui.folded(state, student)
    file = job.folder / f"{job.trained.run}.safetensors"
    rank = job.config.rank if lora is None else lora.rank
    metadata = {**_metadata(job), "rank": rank, "alpha": rank if lora is None else lora.alpha}
    comfyui.write_lora(file, factors, folded, before, job.config.precision, metadata)
    comfyui.write_node(job.folder, job.trained.run, state, student)
    difference = _check_folded(job, student, comfyui.reader(file, before))
    if lost is not None:
        found, trained = (verify.flow_map_outputs(network, job.probe) for network in (student, job.network))
        difference = verify.check_outputs("the LoRA file", found, trained, float("inf"))
    return Exported(difference, lost)


def export_wan_pipeline(job: Job) -> Exported:
    """Write a WanPipeline of a teacher. Wan has a single time, so the network must have gate 0.

    Raises:
        UserError: the network has a second time or is causal.
    """
    gate = job.trained.times["gate_value"]
    if gate != 0:
        problem = f"wan_pipeline needs student.gate_value=0, but this run has {gate}; use format=pipeline"
        raise UserError("format", problem)
    if "chunk_partition" in job.network.config:
        raise UserError("format", "wan_pipeline cannot contain a causal network; use format=pipeline")
    source, probe = job.codec_folder(), job.probe
    expected = verify.flow_map_outputs(job.network, probe, verify.AT_ONCE)
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
    return Exported(difference)


FORMATS: dict[str, Callable[[Job], Exported]] = {
    "pipeline": export_pipeline,
    "transformer": export_transformer,
    "lora": export_lora,
    "wan_pipeline": export_wan_pipeline,
    "comfyui": export_comfyui,
    "comfyui_lora": export_comfyui_lora,
}


def _adapters(job: Job) -> tuple[Backbone, dict[str, Tensor], float | None]:
    """Return the base, the adapters on it, and the share of the change that they lose; None for trained adapters.

    Raises:
        UserError: the run started from random weights, or its weights cannot be written as adapters.
    """
    if job.trained.init is None:
        raise UserError("format", f"{job.config.format} needs a base, but the run started from random weights")
    if job.trained.adapter is not None:
        source = open_source(job.checkpoint)
        return assemble(source.arguments, source.read), trained_factors(job.network), None
    source = open_base(job.trained)
    # The base of Wan2.1 has no second time of its own; it gets the student's.
    base = assemble({**source.arguments, **job.trained.times}, source.read)
    factors, lost = truncated_factors(job.network, base.state_dict(), job.config.rank)
    return base, factors, lost


def _with_weights(network: Backbone, weights: dict[str, Tensor]) -> Backbone:
    return assemble(network.config, weights.__getitem__).eval()


def _metadata(job: Job) -> dict[str, Any]:
    base = hub_id(base_of(job.trained) or job.trained.init) or public_name(base_of(job.trained) or job.trained.init)
    title = f"{job.trained.run}, step {read_step(job.checkpoint)}"
    return {"modelspec.title": title, "base": base or "random weights", "shift": job.config.shift, **job.trained.times}


def _check_folded(job: Job, network: Backbone, read: Callable[[str], Tensor]) -> float:
    """Compare the Wan2.1 network of a written file with the trained network at r = 0."""
    probe = verify.Probe.of(network.config)
    arguments = {**network.config, **TEACHER_TIMES}  # its only time embedding holds the second time at r = 0
    written = assemble(arguments, lambda name: read(name.replace(DELTA, TIME)))
    found = verify.flow_map_outputs(written, probe, verify.AT_ONCE)
    expected = verify.flow_map_outputs(network, probe, verify.TO_DATA)
    return verify.check_outputs("the file for ComfyUI", found, expected, job.tolerance)


def _merge(job: Job) -> tuple[Backbone, Tensor]:
    """Merge the adapters, and compare with the trained network. Returns the merged one, and the outputs of both."""
    expected = verify.flow_map_outputs(job.network, job.probe)
    merged = merge_lora(job.network)
    found = verify.flow_map_outputs(merged, job.probe)
    verify.check_outputs("the model with LoRA merged", found, expected, verify.MERGE_TOLERANCE)
    return merged, expected


def _write_student(job: Job, folder: Path) -> float:
    merged, expected = _merge(job)
    reloaded = _write(job, stock_class(merged.config), folder, merged)
    found = verify.flow_map_outputs(reloaded, job.probe)
    return verify.check_outputs("the transformer", found, expected, job.tolerance)


def _write(job: Job, network_class: Stock, folder: Path, network: Any) -> Any:
    """Write a network as stock diffusers' network, reload it in float32, and compare the weights."""
    state = stored(network.state_dict(), job.config.precision)
    write_network(network_class, folder, network.config, state, job.config.max_shard_gib)
    reloaded = network_class.from_pretrained(folder, dtype=torch.float32)
    verify.check_weights(reloaded, state)
    return reloaded
