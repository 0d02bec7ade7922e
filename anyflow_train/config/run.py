"""Config of a training run, decoded by `anyflow train`, `check`, `plan` and `sweep`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
)
from pydantic_core import PydanticCustomError

from anyflow_train.config.base import ClipSize, Log, Model, Sizes
from anyflow_train.config.network import Student, Teacher
from anyflow_train.config.objective import Share, Times
from anyflow_train.config.objectives import Objective
from anyflow_train.config.on_policy import NoOnPolicy, OnPolicy

AttentionKernel = Literal["auto", "sdpa", "cudnn", "flash"]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Ema(Model):
    """Exponential moving average of the trainable parameters; it equals them before `start_step`."""

    decay: Decay = 0.999
    start_step: NonNegativeInt = 1000


class Optimizer(Model):
    """AdamW, with a linear warm-up and then a constant or cosine learning rate.

    moments: 8bit stores the moments in a quarter of the memory, with one scale per block (bitsandbytes). Only for one
        process or DDP; ZeRO splits the moments over the processes instead.
    final_lr_share: final learning rate of the cosine schedule, as a share of lr.
    warmup_steps: steps in which the learning rate rises linearly from 0.
    clip_norm: largest norm of the gradient.
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


def _locations(value: object) -> object:
    several = isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value)
    if not several and not isinstance(value, str):
        raise PydanticCustomError("locations", "give one folder or address, or a list of them")
    return tuple(value) if isinstance(value, list | tuple) else value


def _as_written(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


class Data(Model):
    """Shards of latents and text embeddings, written by `anyflow prepare`.

    shards: folder or remote address of the shards, or a list of several.
    weights: shares in which samples come from several `shards`, such as [3, 1]; empty draws all samples equally often.
    frames: frames per clip, 4n + 1.
    height, width: size of the clips in pixels.
    buckets: sizes to train on, as frames, height and width, such as [17x64x64,17x48x80,1x64x64]; one is drawn per step.
        Validation uses frames, height and width, which must be one of them. Empty trains on this size alone.
    workers: threads that read ahead; 0 reads each batch when it is needed.
    text_lengths: lengths to which text is padded; each step draws one of them (Wan2.1 pads to 512 without a mask).
    max_bad_share: share of unreadable samples at which a run stops.
    cache: folder for copies of remote shards; cache_gib limits its size.
    shuffle_shards: samples are shuffled within groups of this many shuffled shards; null shuffles all of them together.
        Set it if remote shards are larger than the cache, which must hold two groups.
    generations: location of shards that have grown -> state to use, counted from 0. A location that is not named uses
        the newest state; a run that resumes uses the one that it began with.
    """

    shards: Annotated[str | tuple[str, ...], PlainValidator(_locations), PlainSerializer(_as_written)]
    weights: tuple[PositiveFloat, ...] = ()
    frames: PositiveInt
    height: PositiveInt
    width: PositiveInt
    buckets: Sizes = ()
    text_lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (512,)
    workers: NonNegativeInt = 2
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    cache: str | None = None
    cache_gib: PositiveFloat = 100.0
    shuffle_shards: PositiveInt | None = None
    generations: dict[str, NonNegativeInt] = Field(default_factory=dict)

    @property
    def size(self) -> ClipSize:
        """Size of the clips of validation, and of training without buckets."""
        return ClipSize(self.frames, self.height, self.width)

    @property
    def sizes(self) -> tuple[ClipSize, ...]:
        """All sizes of the training clips."""
        return self.buckets or (self.size,)

    @property
    def locations(self) -> tuple[str, ...]:
        """All locations in `shards`."""
        return (self.shards,) if isinstance(self.shards, str) else self.shards


class Engine(Model):
    """Device, precision and batch of a step. Gradient accumulation is global_batch / (micro_batch x processes).

    fp8: frozen uses 8-bit products for frozen weights (the teacher's, and the base of adapters) instead of bfloat16.
        Requires a GPU of compute capability 8.9 or newer (L40, H100); a CPU also works, for tests.
    attention: kernel of softmax attention. auto uses cuDNN on Hopper and newer GPUs, else flash. sdpa lets torch
        choose; so does any input that the kernel does not support, such as float32 on a GPU.
    precision: precision of matrix products.
    frozen_precision: precision in which weights that are not trained are stored; null uses `precision`. With bf16 they
        take half of the memory of fp32, and a bf16 forward pass gives the same numbers.
    global_batch: samples per step over all processes.
    micro_batch: samples of one process in one forward pass.
    compile: compile the networks with torch.compile.
    threads: CPU threads of torch; 0 lets torch choose.
    sequence_parallel: number of neighbouring processes that split the tokens of each sample; it must divide the heads.
    timeout_seconds: longest time that a process may keep the others waiting; the run then ends.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    frozen_precision: Literal["fp32", "bf16"] | None = None
    fp8: Literal["none", "frozen"] = "none"
    global_batch: PositiveInt = 32
    micro_batch: PositiveInt = 2
    compile: bool = False
    attention: AttentionKernel = "auto"
    threads: NonNegativeInt = 0
    sequence_parallel: PositiveInt = 1
    timeout_seconds: PositiveInt = 1800

    @property
    def stored_frozen(self) -> Literal["fp32", "bf16"]:
        """Precision in which frozen weights are stored."""
        return self.frozen_precision or self.precision


class Context(Model):
    """Frames of a clip that are clean conditioning during training; drawn once per step, the same for all samples.

    i2v_probability: share of steps with a clean first latent frame (image to video). A causal student learns this
        without it.
    long_share: share of steps of a causal student with enough chunks that the oldest are compressed.
    bidirectional_probability: share of steps of a causal student that also train flow matching on whole clips.
    """

    i2v_probability: Share = 0.0
    long_share: Share = 0.5
    bidirectional_probability: Share = 0.1


class Checkpoint(Model):
    """Saving of the run's state, and resuming from it.

    every: steps between checkpoints.
    keep: number of newest checkpoints that are kept.
    keep_every: steps between checkpoints that are never deleted, a multiple of every; 0 means none.
    resume: auto continues from the newest checkpoint of the run directory, if there is one.
    """

    every: PositiveInt = 500
    keep: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    resume: Literal["auto", "never"] = "auto"


class WandbTracker(Model):
    """Weights & Biases, online or offline."""

    kind: Literal["wandb"]
    project: str = "anyflow_train"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class TensorboardTracker(Model):
    """TensorBoard event files in the run directory."""

    kind: Literal["tensorboard"]


class NoTracker(Model):
    """No tracker; every run writes `metrics.jsonl` to its run directory."""

    kind: Literal["none"] = "none"


class Evaluation(Model):
    """Validation during a run, from fixed noise.

    every: steps between validations; 0 means never.
    reference: what samples are compared with: clips (of `held_out`), or the teacher's fine solutions for the same
        prompts and noise (guided if the student learns guidance).
    reference_calls: Euler steps of the teacher's fine solutions. They are made once, and kept in the run directory.
    reference_videos: number of samples that are decoded to compare contrast, saturation and motion with the teacher's.
    held_out: shards of real samples that are not used for training; null leaves out the distances to clips. With
        reference=teacher only their prompts are used; null then takes prompts of the training data.
    calls: numbers of network calls of the samplers to measure.
    best_metric: metric `<metric>_<calls>` that selects the best checkpoint, which is kept; lower is better.
    oracle: closed-form class accuracy on decoded video, for the embedded moving shapes.
    videos: number of the manifest's validation prompts that are decoded and saved.
    """

    every: NonNegativeInt = 500
    reference: Literal["clips", "teacher"] = "clips"
    reference_calls: PositiveInt = 32
    reference_videos: NonNegativeInt = 4
    held_out: str | None = None
    calls: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 8)
    samples: PositiveInt = 64
    batch: PositiveInt = 8
    seed: NonNegativeInt = 0
    shift: PositiveFloat = 5.0
    guidance_scale: PositiveFloat = 1.0
    best_metric: str = "energy_distance_4"
    oracle: Literal["none", "shapes"] = "none"
    videos: NonNegativeInt = 4


Tracker = Annotated[WandbTracker | TensorboardTracker | NoTracker, Field(discriminator="kind")]


class RunConfig(Model):
    """A whole run. The run directory is always `<out>/<name>`, so that a requeued job finds its checkpoint.

    name: name of the run.
    out: parent folder of run directories.
    seed: seed of all random numbers.
    steps: number of training steps.
    log_every: steps between two lines of the log.
    log: auto (a bar on a terminal, plain lines elsewhere), plain, or json (one JSON object per line).
    max_nonfinite_steps: number of consecutive steps with a non-finite loss or gradient after which the run stops.
    profile: print the time of each part of a step, and write a trace to the run directory.
    notify: web address that gets a JSON message when the run ends, fails or skips a step. It is not saved with the
        run, because it may contain a secret.
    """

    renamed: ClassVar[Mapping[str, str]] = {
        "evaluation.steps": "evaluation.calls",
        "on_policy.steps": "on_policy.calls",
    }

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._=,+-]*$")]
    out: str = "runs"
    seed: NonNegativeInt = 0
    steps: PositiveInt
    log_every: PositiveInt = 10
    log: Log = "auto"
    max_nonfinite_steps: PositiveInt = 3
    profile: bool = False
    notify: Annotated[str | None, Field(exclude=True, pattern=r"^https?://")] = None
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
