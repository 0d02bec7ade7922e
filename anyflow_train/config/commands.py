"""Config of the commands beside training: clips, prepare, sample, export, evaluate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from anyflow_train.config.base import Model

GpuName = Literal["a100-40", "a100-80", "h100-80", "h200-141", "b200-180", "l40s-48", "rtx4090-24", "rtx3090-24"]
StrategyName = Literal["ddp", "zero1", "zero2", "zero3", "zero3_offload"]
Steps = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class CheckOptions(Model):
    """What `anyflow check` takes beside the keys of a run.

    derivative: also measure the time derivative's error, on weights and data.
    derivative_weights: run or checkpoint whose averaged weights are measured; null: those that the run begins with.
    derivative_samples: how many samples of the run's data it is measured on.
    derivative_epsilons: half spans of the central difference, in time from 0 to 1.
    """

    derivative: bool = False
    derivative_weights: str | None = None
    derivative_samples: PositiveInt = 32
    derivative_epsilons: Annotated[tuple[Annotated[float, Field(gt=0, le=0.1)], ...], Field(min_length=1)] = (
        0.001,
        0.0025,
        0.005,
        0.01,
        0.02,
    )


class PlanOptions(Model):
    """What `anyflow plan` takes beside the keys of a run.

    gpus: per node; nodes: how many of them.
    gpu: kind of GPU, with its memory in GB.
    strategy: file of `launch/` that the run is started with: how tensors are distributed over the GPUs.
    utilisation: share of the GPU's peak that matrix products reach over a whole step, recomputation included.
    price: of one GPU for an hour, in any currency; null leaves out the cost.
    """

    gpus: PositiveInt = 8
    nodes: PositiveInt = 1
    gpu: GpuName = "h100-80"
    strategy: StrategyName = "ddp"
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.4
    price: NonNegativeFloat | None = None

    @property
    def world(self) -> int:
        """Processes: one for each GPU."""
        return self.gpus * self.nodes


class ClipsConfig(Model):
    """`anyflow clips`: render clips of the embedded stripes world as mp4 with captions."""

    out: str
    count: PositiveInt = 256
    seed: NonNegativeInt = 0


class PrepareConfig(Model):
    """`anyflow prepare`: video and captions -> shards of latents and text embeddings.

    source: folder or WebDataset of clips (`.txt`/`.json` beside each), or a JSONL/CSV manifest; null for prompts only.
    prompts: text file of prompts, one a line, for prompt-only shards.
    codec: Wan2.1 pipeline folder or hub id (VAE, text encoder, tokenizer).
    validation_prompts: prompts, or one text file of them, whose embeddings go into the manifest.
    batch: clips that the VAE encodes at a time.
    precision: of the text encoder; its embeddings are stored as they come out.
    vae_precision: of the VAE, which Wan's own code runs in float32.
    latent_dtype: how latents are stored; bf16 halves the disk space and rounds them by up to 0.4 %.
    """

    out: str
    source: str | None = None
    prompts: str | None = None
    codec: str
    frames: PositiveInt = 81
    height: PositiveInt = 480
    width: PositiveInt = 832
    fps: PositiveFloat = 16.0
    max_text_length: PositiveInt = 512
    negative_prompt: str = ""
    validation_prompts: tuple[str, ...] = ()
    samples_per_shard: PositiveInt = 256
    batch: PositiveInt = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    vae_precision: Literal["fp32", "bf16"] = "fp32"
    latent_dtype: Literal["fp32", "bf16"] = "fp32"
    threads: NonNegativeInt = 0


class SampleConfig(Model):
    """`anyflow sample`: videos from a run, a checkpoint or an exported folder.

    image: file whose picture every clip begins with.
    video: file that every clip goes on from.
    context_frames: of the video, 4n + 1; null: as many whole chunks as it has (one for a student that is not causal).
    chunk_partition: latent frames of a causal student's chunks; null: those that it was trained with.
    """

    model: str
    out: str
    prompts: tuple[str, ...] = ()
    prompt_file: str | None = None
    image: str | None = None
    video: str | None = None
    context_frames: PositiveInt | None = None
    chunk_partition: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    steps: Steps = (4,)
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    weights: Literal["ema", "raw"] = "ema"
    frames: PositiveInt | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    fps: PositiveFloat = 16.0
    guidance_scale: PositiveFloat = 1.0
    negative_prompt: str = ""
    shift: PositiveFloat = 5.0
    text_length: PositiveInt = 512
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    threads: NonNegativeInt = 0


class ExportConfig(Model):
    """`anyflow export`: a checkpoint -> a folder that stock diffusers loads.

    format: pipeline (AnyFlowPipeline, of a causal student AnyFlowFARPipeline), transformer (its transformer alone),
        lora (diffusers LoRA file), wan_pipeline (WanPipeline of a stage-0 teacher, which needs gate 0).
    """

    checkpoint: str
    out: str
    format: Literal["pipeline", "transformer", "lora", "wan_pipeline"] = "pipeline"
    weights: Literal["ema", "raw"] = "ema"
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    codec: str | None = None
    shift: PositiveFloat = 5.0
    max_shard_gib: PositiveFloat = 5.0
    overwrite: bool = False


class EvaluateConfig(Model):
    """`anyflow evaluate`: teacher and students at a list of step counts, same noise.

    models: runs, checkpoints or exported folders of students; none, and the teacher is measured alone.
    held_out: shards that samples are compared with.
    reference: data (held-out shards) or guided_teacher (the teacher's fine guided samples).
    fine_steps: Euler steps of the teacher's fine ODE solution; shifts: the teacher is given the best of these.
    oracle_samples: how many of the samples are decoded for the oracle, which takes longer than making them.
    text_length: tokens to which texts are padded with zeros; stock pipelines pad to 512.
    conditioning_frames: latent frames that students are given of held-out clips, others than samples are compared with.
    training_shards: what the models were trained on; how near samples come to it is then measured too.
    """

    out: str
    models: tuple[str, ...]
    held_out: str
    teacher: str
    codec: str | None = None
    training_shards: str | None = None
    reference: Literal["data", "guided_teacher"] = "data"
    guidance_scale: PositiveFloat = 1.0
    weights: Literal["ema", "raw"] = "ema"
    steps: Steps = (1, 2, 4, 8, 16)
    samples: PositiveInt = 512
    held_out_samples: PositiveInt = 2048
    fine_steps: PositiveInt = 128
    shifts: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0, 3.0, 5.0)
    shift: PositiveFloat = 5.0
    oracle: Literal["none", "stripes"] = "none"
    oracle_samples: PositiveInt = 512
    conditioning_frames: NonNegativeInt = 0
    bootstrap: PositiveInt = 1000
    batch: PositiveInt = 32
    seed: NonNegativeInt = 0
    text_length: PositiveInt = 512
    videos: NonNegativeInt = 4
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    threads: NonNegativeInt = 0
