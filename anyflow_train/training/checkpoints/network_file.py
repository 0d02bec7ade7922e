"""`network.json` of a checkpoint: everything that is needed to load its network and to sample from it.

The file is small and has its own format version, so that old networks load after keys of the config are renamed or
removed. For older checkpoints without this file, the values are read from their `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from anyflow_train.config.network import STUDENT_TIMES, Causal, Lora, Student, plain
from anyflow_train.config.original import is_weights_file
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from anyflow_train.training.checkpoints.config_file import first_key

FORMAT = 1
NAME = "network.json"
CHUNKS = tuple(Causal.model_fields)


class _Stored(BaseModel):
    """Base class that ignores unknown keys, so that later versions can add keys."""

    model_config = ConfigDict(extra="ignore", frozen=True)


def _adapter(value: Any) -> Any:
    """Keep the keys of an adapter that this version knows. Returns None for `kind: full`."""
    if not isinstance(value, Mapping):
        return value
    known = {name: entry for name, entry in value.items() if name in Lora.model_fields}
    return known if known.get("kind") == "lora" else None


def _tuples(value: Any) -> Any:
    """Convert lists to tuples, which constructors require."""
    return {name: plain(entry) for name, entry in value.items()} if isinstance(value, Mapping) else value


class Sampling(_Stored):
    """Settings for sampling clips.

    any_step: whether the network jumps between any two times; otherwise it takes Euler steps.
    conditioning_frames: whether it was trained with conditioning frames.
    frames, height, width: number of frames and size in pixels of the training clips; None if not known.
    shift: shift of the times in training.
    """

    any_step: bool = True
    conditioning_frames: bool = True
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    shift: float = 5.0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sampling:
        """Read the settings from a saved config. Missing keys have their defaults."""
        data, context = _part(config, "data"), _part(config, "context")
        known = {name: data.get(name) for name in ("frames", "height", "width")}
        return cls(
            any_step=_part(config, "objective").get("kind") != "flow_matching",
            conditioning_frames=context.get("i2v_probability", 1.0) > 0,
            shift=_part(config, "times").get("shift", 5.0),
            **known,
        )


class Training(_Stored):
    """Facts for a model card: a short description of the objective, and samples per step."""

    objective: str = "unknown"
    global_batch: int = 0


class NetworkFile(_Stored):
    """Description of a trained network, without its weights.

    format: format version of the file.
    run: name of the run.
    arguments: arguments of the network's constructor, which also determine its class.
    adapter: the LoRA adapter that was trained; None if the whole network was trained.
    init: start of the network or base of its adapter: folder, hub id, run or checkpoint; None for random weights.
    codec: pipeline folder or hub id of the VAE and the text encoder.
    teacher: pipeline folder or hub id of the teacher of the run.
    shards: folder of the training data.
    """

    format: int = FORMAT
    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=,+-]*$")] = "unnamed"  # exports name files after it
    arguments: Annotated[dict[str, Any], BeforeValidator(_tuples)]
    adapter: Annotated[Lora | None, BeforeValidator(_adapter)] = None
    init: str | None = None
    codec: str | None = None
    teacher: str | None = None
    shards: str | None = None
    sampling: Sampling = Sampling()
    training: Training = Training()

    @property
    def times(self) -> dict[str, Any]:
        """Arguments for the network's second time."""
        return {name: self.arguments[name] for name in STUDENT_TIMES}

    @property
    def causal(self) -> dict[str, Any] | None:
        """Arguments that only a causal network has; None if the network is not causal."""
        return {name: self.arguments[name] for name in CHUNKS} if CHUNKS[0] in self.arguments else None

    @classmethod
    def of_student(cls, student: Student) -> NetworkFile:
        """Describe the network of a config."""
        adapter: Any = student.adapter.model_dump()  # validated
        return cls(arguments=student.arguments(), adapter=adapter, init=student.init)

    @classmethod
    def of_run(cls, config: RunConfig) -> NetworkFile:
        """Describe the network that a run trains, for its checkpoints."""
        saved = cls.of_saved(config.model_dump(mode="json"), config.name)
        sampling = saved.sampling.model_copy(update={"any_step": config.objective.any_step})
        training = saved.training.model_copy(update={"objective": config.objective.summary})
        return saved.model_copy(update={"sampling": sampling, "training": training})

    @classmethod
    def of_saved(cls, config: Mapping[str, Any], where: str) -> NetworkFile:
        """Describe the network of a saved config. The rest of the config does not need to be valid.

        Raises:
            UserError: the config does not define the shape of the network.
        """
        student, teacher = _part(config, "student"), _part(config, "teacher")
        shape = dict(_part(student, "architecture"))
        causal = shape.pop("causal", None) or {}
        times = {name: student.get(name, default) for name, default in STUDENT_TIMES.items()}
        objective, source = _part(config, "objective"), teacher.get("source") or ""
        shards = _part(config, "data").get("shards")
        content = {
            "run": config.get("name") or "unnamed",
            "arguments": {**shape, **causal, **times},
            "adapter": student.get("adapter"),
            "init": student.get("init"),
            "codec": teacher.get("codec") or (None if is_weights_file(source) else source or None),
            "teacher": source or None,
            "shards": shards if isinstance(shards, str) or not shards else shards[0],
            "sampling": Sampling.of(config),
            "training": {
                "objective": f"{objective.get('kind', 'unknown')}, guidance {objective.get('guidance', 'none')} "
                f"(scale {objective.get('guidance_scale', 1.0):g})",
                "global_batch": _part(config, "engine").get("global_batch", 0),
            },
        }
        if not shape:
            raise UserError(where, "lacks student.architecture, so its network cannot be built")
        return cls._checked(content, where)

    @classmethod
    def of_file(cls, content: Any, where: str) -> NetworkFile:
        """Decode the content of `network.json`.

        Raises:
            UserError: a newer version wrote it, or it has another structure.
        """
        written = content.get("format") if isinstance(content, Mapping) else None
        if isinstance(written, int) and written > FORMAT:
            raise UserError(where, f"has format {written}; this version of anyflow_train reads up to {FORMAT}")
        return cls._checked(content, where)

    @classmethod
    def _checked(cls, content: Any, where: str) -> NetworkFile:
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            problem = f"{first_key(error)} does not describe a network that this version supports"
            raise UserError(where, problem.lstrip()) from None


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = config.get(name)
    return part if isinstance(part, Mapping) else {}
