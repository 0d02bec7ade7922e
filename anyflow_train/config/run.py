"""Config of a training run: everything that `anyflow train`, `check` and `sweep` decode."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from anyflow_train.config.base import Model
from anyflow_train.config.network import Student, Teacher
from anyflow_train.config.objective import Objective, Share, Times
from anyflow_train.config.on_policy import NoOnPolicy, OnPolicy

AttentionKernel = Literal["auto", "sdpa", "cudnn", "flash"]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Ema(Model):
    """Exponential moving average of the trainable parameters: a plain copy before `start_step`."""

    decay: Decay = 0.999
    start_step: NonNegativeInt = 1000


class Optimizer(Model):
    """AdamW, with a linear warm-up and then a constant or cosine learning rate.

    moments: 8bit keeps the moments in a quarter of the memory, in blocks with a scale each (bitsandbytes). For one
        process and DDP; ZeRO cuts them over the processes instead.
    """

    lr: PositiveFloat = 5e-5
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    moments: Literal["fp32", "8bit"] = "fp32"
    warmup_steps: NonNegativeInt = 1000
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    clip_norm: PositiveFloat = 1.0
    ema: Ema = Ema()


class Data(Model):
    """Shards of latents and text embeddings, written by `anyflow prepare`.

    text_lengths: the text is padded to one of these lengths, drawn anew each step (Wan2.1 pads to 512 without a mask).
    max_bad_share: the share of unreadable samples at which a run stops.
    cache: folder for copies of remote shards; cache_gib bounds it.
    shuffle_shards: samples are shuffled within groups of this many shuffled shards (null: all at once). For remote
        shards larger than the cache: it has to hold two groups.
    """

    shards: str
    frames: PositiveInt
    height: PositiveInt
    width: PositiveInt
    text_lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (512,)
    workers: NonNegativeInt = 2
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    cache: str | None = None
    cache_gib: PositiveFloat = 100.0
    shuffle_shards: PositiveInt | None = None


class Engine(Model):
    """Where and in which precision a step runs. Accumulation follows: global_batch / (micro_batch x processes).

    fp8: frozen multiplies frozen weights in 8 bits where the others do in bfloat16: a teacher's, and those that
        adapters sit on. Needs a GPU of compute capability 8.9 (L40, H100), or a CPU for trying it.
    attention: kernel of softmax attention. auto takes cuDNN's on GPUs from Hopper on, else flash; sdpa is torch's own
        choice, which is also taken for what a kernel cannot do, such as products in float32 on a GPU.
    sequence_parallel: neighbouring processes that share each sample and split its tokens; it divides the heads.
    timeout_seconds: how long a process may keep the others waiting before the run ends.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    fp8: Literal["none", "frozen"] = "none"
    global_batch: PositiveInt = 32
    micro_batch: PositiveInt = 2
    compile: bool = False
    attention: AttentionKernel = "auto"
    threads: NonNegativeInt = 0
    sequence_parallel: PositiveInt = 1
    timeout_seconds: PositiveInt = 1800


class Context(Model):
    """What of its clip a sample is given while it is trained, drawn once a step for all samples.

    i2v_probability: share of steps in which the first latent frame is given, clean (image to video); a causal student
        learns that anyway.
    long_share: share of a causal student's steps that have so many chunks that the oldest are compressed.
    bidirectional_probability: share of a causal student's steps that also train flow matching on whole clips.
    """

    i2v_probability: Share = 0.0
    long_share: Share = 0.5
    bidirectional_probability: Share = 0.1


class Checkpoint(Model):
    """When the run's state is saved, what is kept, and whether a run continues from it."""

    every: PositiveInt = 500
    keep: PositiveInt = 2
    resume: Literal["auto", "never"] = "auto"


class WandbTracker(Model):
    """Weights & Biases, online or offline."""

    kind: Literal["wandb"]
    project: str = "anyflow_train"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class TensorboardTracker(Model):
    """TensorBoard event files inside of the run directory."""

    kind: Literal["tensorboard"]


class NoTracker(Model):
    """Only the run directory's own `metrics.jsonl`, which every run has."""

    kind: Literal["none"] = "none"


class Evaluation(Model):
    """Validation inside of a run: every `every` steps (0: never), from fixed noise.

    held_out: shards of real samples that training never sees; null leaves out the distances.
    best_metric: the checkpoint with the lowest value is kept: `<metric>_<steps>`.
    oracle: closed-form class accuracy on decoded video (`stripes`, `shapes`: the embedded worlds).
    videos: how many of the manifest's validation prompts are decoded and saved.
    """

    every: NonNegativeInt = 500
    held_out: str | None = None
    steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 8)
    samples: PositiveInt = 64
    batch: PositiveInt = 8
    seed: NonNegativeInt = 0
    shift: PositiveFloat = 5.0
    guidance_scale: PositiveFloat = 1.0
    best_metric: str = "energy_distance_4"
    oracle: Literal["none", "stripes", "shapes"] = "none"
    videos: NonNegativeInt = 4


Tracker = Annotated[WandbTracker | TensorboardTracker | NoTracker, Field(discriminator="kind")]


class RunConfig(Model):
    """A whole run. The run directory is `<out>/<name>`: stable, so that a requeued job finds its checkpoint.

    profile: print where the time of a step goes, part by part, and leave a trace in the run directory.
    """

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._=,+-]*$")]
    out: str = "runs"
    seed: NonNegativeInt = 0
    steps: PositiveInt
    log_every: PositiveInt = 10
    max_nonfinite_steps: PositiveInt = 3
    profile: bool = False
    student: Student
    teacher: Teacher = Teacher()
    objective: Objective
    times: Times = Times()
    on_policy: OnPolicy = NoOnPolicy()
    optimizer: Optimizer = Optimizer()
    context: Context = Context()
    data: Data
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    tracker: Tracker = NoTracker()
    evaluation: Evaluation = Evaluation()
