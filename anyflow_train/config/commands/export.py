"""Keys of `anyflow export`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from anyflow_train.config.base import Log, Model
from anyflow_train.config.commands.types import Texts


class ExportConfig(Model):
    """`anyflow export`: a checkpoint -> a folder that stock diffusers or ComfyUI loads.

    format: pipeline (AnyFlowPipeline, or AnyFlowFARPipeline for a causal student), transformer (only the pipeline's
        transformer), lora (diffusers LoRA file), wan_pipeline (WanPipeline of a stage-0 teacher with gate_value=0),
        comfyui (one file with Wan's original names, and a custom node), comfyui_lora (a LoRA file for ComfyUI, and the
        node).
    model: run, checkpoint or sweep folder; `checkpoint` is another name of this key.
    out: folder to write.
    weights: ema (moving average) or raw (last weights of the run).
    precision: type of the exported weights.
    rank: largest rank of the adapters if a LoRA file is made from a run that trained the whole network.
    codec: pipeline folder or hub id of the VAE and text encoder; null uses the run's.
    shift: timestep shift of the exported scheduler.
    max_shard_gib: largest size of one weights file, in GiB.
    overwrite: replace an earlier export in `out`.
    push: repository on the Hugging Face Hub, owner/name, to upload the folder to; null uploads nothing.
    private: whether a new repository is private.
    prompt: prompt of the example in the model card.
    license: license in the model card; null names Wan2.1's if the run started from its published weights.
    datasets: hub ids of the training data, for the model card.
    log: auto (a bar on a terminal, plain lines elsewhere), plain, or json (one JSON object per line).
    """

    aliases: ClassVar[Mapping[str, str]] = {"checkpoint": "model"}

    model: str
    out: str
    format: Literal["pipeline", "transformer", "lora", "wan_pipeline", "comfyui", "comfyui_lora"] = "pipeline"
    weights: Literal["ema", "raw"] = "ema"
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    rank: PositiveInt = 64
    codec: str | None = None
    shift: PositiveFloat = 5.0
    max_shard_gib: PositiveFloat = 5.0
    overwrite: bool = False
    push: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")] | None = None
    private: bool = True
    prompt: str = "A red panda walks along a snowy branch."
    license: str | None = None
    datasets: Texts = ()
    log: Log = "auto"
