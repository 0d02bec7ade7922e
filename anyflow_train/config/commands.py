"""Config of the commands other than `train`: check, plan, clips, prepare, sample, export, evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from anyflow_train.config.base import Model

GpuName = Literal["a100-40", "a100-80", "h100-80", "h200-141", "b200-180", "l40s-48", "rtx4090-24", "rtx3090-24"]
StrategyName = Literal["ddp", "zero1", "zero2", "zero3", "zero3_offload"]
HalfWidth = Annotated[float, Field(gt=0, le=0.1)]
# A list, or one text, which becomes a list of one.
Texts = Annotated[
    tuple[str, ...],
    BeforeValidator(
        lambda value: (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
    ),
]
Calls = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class CheckOptions(Model):
    """Keys of `anyflow check`, in addition to the keys of a run.

    derivative: also measure the error of the time derivative on real weights and data.
    derivative_weights: run or checkpoint whose averaged weights are used; null uses the run's initial weights.
    derivative_samples: number of samples of the run's data to measure on.
    derivative_epsilons: half-widths of the central difference to compare; time runs from 0 to 1.
    """

    derivative: bool = False
    derivative_weights: str | None = None
    derivative_samples: PositiveInt = 32
    derivative_epsilons: Annotated[tuple[HalfWidth, ...], Field(min_length=1)] = (0.001, 0.0025, 0.005, 0.01, 0.02)


class PlanOptions(Model):
    """Keys of `anyflow plan`, in addition to the keys of a run.

    gpus: GPUs per node.
    nodes: number of nodes.
    gpu: GPU model, with its memory in GB.
    strategy: file of `launch/` that starts the run; it decides how tensors are distributed over the GPUs.
    utilisation: share of the GPU's peak that matrix products reach over a whole step, including recomputation.
    price: price of one GPU for one hour, in any currency; null leaves out the cost.
    """

    gpus: PositiveInt = 8
    nodes: PositiveInt = 1
    gpu: GpuName = "h100-80"
    strategy: StrategyName = "ddp"
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.4
    price: NonNegativeFloat | None = None

    @property
    def world(self) -> int:
        """Number of processes: one for each GPU."""
        return self.gpus * self.nodes


class SweepOptions(Model):
    """Keys of `anyflow sweep`, in addition to the keys of its runs.

    train: arguments of `anyflow train` for all runs, before those of the command line; `key=a,b` runs each value.
    arms: name of a variant -> its arguments of `anyflow train`. Every variant runs with every combination of values.
    equal_operations: set the steps of every run, so that all take as many operations as the first one.
    jobs: runs at a time; null starts one per GPU, or one if there is no GPU. Up to the number of GPUs, each run has one
        for itself.
    evaluate: arguments of `anyflow evaluate` for all runs together, such as experiment=tiny_evaluate. The sweep then
        ends with a table and a plot of all variants, over all seeds. Empty leaves it out.
    sampler: grid (every combination), or tpe (Optuna searches the values; runs whose validation is behind are ended).
    trials: number of runs with sampler=tpe.
    cluster: none, slurm (one job per run, through submitit), or local (the same with processes of this machine).
    slurm: parameters of submitit, such as timeout_min, gpus_per_node and slurm_partition.
    """

    aliases: ClassVar[Mapping[str, str]] = {"sweep.sampler": "sampler", "sweep.trials": "trials"}

    train: tuple[str, ...] = ()
    arms: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    equal_operations: bool = False
    jobs: PositiveInt | None = None
    evaluate: tuple[str, ...] = ()
    sampler: Literal["grid", "tpe"] = "grid"
    trials: PositiveInt = 20
    cluster: Literal["none", "slurm", "local"] = "none"
    slurm: dict[str, str | int | float] = Field(default_factory=dict)


class DistilOptions(Model):
    """`anyflow distil`: the whole way from clips to an exported student. The same line resumes it.

    source: folder or list of clips with captions, as for `anyflow prepare`.
    prompts: file of prompts instead of clips; stage 1 then takes its points from noise (objective.source=student).
    held_out: clips that the student is compared with; null leaves out the evaluation.
    out: folder of shards, runs, the exported pipeline, the report, and the page `summary.md`.
    strategy: strategy of `anyflow launch` for the training; null trains in one process.
    prepare, stage1, stage2, export, evaluate: arguments of `anyflow prepare`, of `anyflow train` for both stages, of
        `anyflow export` and of `anyflow evaluate`. An empty stage2 is left out.
    """

    source: str | None = None
    prompts: str | None = None
    held_out: str | None = None
    out: str = "runs/distil"
    strategy: str | None = None
    prepare: Texts = ()
    stage1: Texts = ()
    stage2: Texts = ()
    export: Texts = ()
    evaluate: Texts = ()


class RunsConfig(Model):
    """`anyflow runs`: a table of the runs in a folder.

    folder: folder of run directories and sweeps, or one run directory.
    prune: delete what is needed neither to resume nor to export. Running runs are left alone.
    """

    folder: str
    prune: bool = False


class WatchConfig(Model):
    """`anyflow watch`: a page in the browser over the runs of a folder. Only this machine can open it.

    runs: folder of run directories and sweeps, or one run directory.
    port: port of the page; 0 takes any free one.
    """

    runs: str
    port: Annotated[int, Field(ge=0, le=65535)] = 8787


class ReportConfig(Model):
    """`anyflow report`: the page of `anyflow watch` as one file, which needs no network.

    run: run directory, or a folder of several.
    out: the .html file to write.
    """

    run: str
    out: str = "report.html"


class ClipsConfig(Model):
    """`anyflow clips`: render mp4 clips of moving shapes, with captions.

    out: folder for the clips.
    count: number of clips.
    """

    out: str
    count: PositiveInt = 256
    seed: NonNegativeInt = 0


class PrepareConfig(Model):
    """`anyflow prepare`: video and captions -> shards of latents and text embeddings.

    out: folder for the shards and their manifest.
    source: folder or WebDataset of clips (with a `.txt` or `.json` file per clip), or a list of clips (CSV, TSV, JSON,
        JSONL, Parquet, or TXT with one video per line); null for prompts only.
    prompts: text file with one prompt per line, or a list with captions, for shards of prompts only.
    teacher: pipeline folder, hub id or run whose network makes the latents for `prompts`; null writes prompts only.
    steps: Euler steps of the teacher.
    guidance_scale: CFG scale w of the teacher; 1 means no guidance.
    shift: timestep shift of the teacher's steps.
    seed: seed of the teacher's noise.
    latents: latents and texts of Wan2.1 that FastVideo (`.parquet`) or rcm (`.tar`) have cached: a file or folder. They
        become shards in one process, without growth.
    caption_key: name of the caption in JSON, or of its column; null tries caption, text, prompt and cap.
    encoding: encoding of captions and lists that are not Unicode, such as cp1252 or shift_jis; null reads them as
        cp1252 with a warning.
    codec: Wan2.1 pipeline folder or hub id (VAE, text encoder, tokenizer).
    frames: frames per clip, 4n + 1.
    height, width: size of the clips in pixels.
    fps: frame rate to which clips are resampled.
    hdr: clips in HDR (PQ or HLG) are tone mapped to SDR (tonemap), or skipped and counted (skip).
    min_size, min_seconds: clips with a shorter side (pixels), or a shorter duration by their file, are skipped.
    max_upscale: clips that would have to be enlarged by more than this factor are skipped; null enlarges any.
    max_text_length: largest number of tokens per text; longer texts are cut.
    negative_prompt: text for guidance and text dropout.
    validation_prompts: prompts, or one text file with prompts, whose embeddings are stored in the manifest.
    prune: remove samples of clips that are gone from the source, and old samples of clips that have changed. Runs that
        began on them cannot be resumed.
    dry_run: print what would be encoded, and write a contact sheet of 16 decoded clips next to `out`.
    batch: clips that the VAE encodes, or the teacher makes, at a time.
    precision: precision of the text encoder and of the teacher's matrix products; embeddings are stored in it.
    vae_precision: precision of the VAE; Wan's own code runs it in float32.
    latent_dtype: type of the stored latents; bf16 halves the disk space and rounds values by up to 0.4 %.
    """

    out: str
    source: str | None = None
    prompts: str | None = None
    teacher: str | None = None
    steps: PositiveInt = 50
    guidance_scale: PositiveFloat = 1.0
    shift: PositiveFloat = 5.0
    seed: NonNegativeInt = 0
    latents: str | None = None
    caption_key: str | None = None
    encoding: str | None = None
    codec: str
    frames: PositiveInt = 81
    height: PositiveInt = 480
    width: PositiveInt = 832
    fps: PositiveFloat = 16.0
    hdr: Literal["tonemap", "skip"] = "tonemap"
    min_size: NonNegativeInt = 0
    min_seconds: NonNegativeFloat = 0.0
    max_upscale: PositiveFloat | None = None
    max_text_length: PositiveInt = 512
    negative_prompt: str = ""
    validation_prompts: tuple[str, ...] = ()
    samples_per_shard: PositiveInt = 256
    prune: bool = False
    dry_run: bool = False
    batch: PositiveInt = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    vae_precision: Literal["fp32", "bf16"] = "fp32"
    latent_dtype: Literal["fp32", "bf16"] = "fp32"
    threads: NonNegativeInt = 0


class ShardsConfig(Model):
    """`anyflow shards FOLDER`: what a folder of shards holds.

    folder: folder or remote address of the shards.
    verify: read every sample, and compare its bytes with the checksum. Without it, equal clips are found only if their
        captions are equal too.
    held_out: shards that must not hold the same clips; null leaves the comparison out.
    pictures: number of samples on the contact sheet; 0 leaves it out.
    out: file of the contact sheet; null writes `contact_sheet.png` into the folder.
    codec: pipeline folder or hub id of the VAE; null uses the one that the shards name.
    threads: CPU threads of torch; 0 lets torch choose.
    """

    folder: str
    verify: bool = False
    held_out: str | None = None
    pictures: NonNegativeInt = 16
    out: str | None = None
    codec: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: NonNegativeInt = 0


class SampleConfig(Model):
    """`anyflow sample`: videos from a run, a checkpoint or an exported folder.

    model: run, checkpoint, exported folder or hub id.
    out: folder for the videos.
    prompt: one prompt; commas belong to it.
    prompts: list of prompts, or a `.txt` file with one prompt per line.
    image: image file that becomes the first frame of every clip.
    video: video file that every clip continues.
    context_frames: number of frames to use from the video, 4n + 1; null uses as many whole chunks as it has (one
        frame for a student that is not causal).
    chunk_partition: latent frames of each chunk of a causal student; null uses the chunks of its training.
    calls: numbers of network calls; each makes its own video.
    seeds: seeds of the noise; each makes its own video.
    weights: ema (moving average) or raw (last weights of the run).
    frames: frames per video, 4n + 1; null uses the size of the training clips.
    height, width: size of the videos in pixels; null uses the size of the training clips.
    guidance_scale: CFG scale w; 1 means no guidance.
    shift: timestep shift of the sampler.
    text_length: tokens to which texts are padded with zeros; stock pipelines pad to 512.
    codec: pipeline folder or hub id of the VAE and text encoder; null uses the model's.
    threads: CPU threads of torch; 0 lets torch choose.
    """

    renamed: ClassVar[Mapping[str, str]] = {"prompt_file": "prompts", "steps": "calls"}

    model: str
    out: str
    prompt: str = ""
    prompts: Texts = ()
    image: str | None = None
    video: str | None = None
    context_frames: PositiveInt | None = None
    chunk_partition: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    calls: Calls = (4,)
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
    codec: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    threads: NonNegativeInt = 0


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


class EvaluateConfig(Model):
    """`anyflow evaluate`: compare teacher and students at several numbers of calls, from the same noise.

    out: folder for the report, plots and videos.
    models: runs, checkpoints, sweeps or exported folders of students; an empty list measures only the teacher.
    held_out: shards that samples are compared with.
    teacher: Wan2.1 pipeline folder or hub id.
    guidance_scale: CFG scale w of the teacher; 1 means no guidance.
    calls: numbers of network calls to compare.
    samples: samples per model and number of calls.
    held_out_samples: number of held-out samples to compare with.
    reference: data (held-out shards) or guided_teacher (the teacher's guided samples at fine_steps).
    fine_steps: Euler steps of the teacher's fine ODE solution.
    shifts: timestep shifts to try for the teacher; the best one is reported.
    shift: timestep shift of the students' samples and of the teacher's fine solution.
    oracle_samples: number of samples to decode for the oracle; decoding takes longer than sampling.
    text_length: tokens to which texts are padded with zeros; stock pipelines pad to 512.
    conditioning_frames: latent frames of held-out clips that students continue. Samples are compared with other clips.
    training_shards: shards that the models were trained on; if set, the distance of samples to them is measured too.
    bootstrap: number of bootstrap resamples for the confidence intervals.
    videos: number of sample videos to write.
    """

    renamed: ClassVar[Mapping[str, str]] = {"steps": "calls"}

    out: str
    models: Texts
    held_out: str
    teacher: str
    codec: str | None = None
    training_shards: str | None = None
    reference: Literal["data", "guided_teacher"] = "data"
    guidance_scale: PositiveFloat = 1.0
    weights: Literal["ema", "raw"] = "ema"
    calls: Calls = (1, 2, 4, 8, 16)
    samples: PositiveInt = 512
    held_out_samples: PositiveInt = 2048
    fine_steps: PositiveInt = 128
    shifts: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0, 3.0, 5.0)
    shift: PositiveFloat = 5.0
    oracle: Literal["none", "shapes"] = "none"
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
