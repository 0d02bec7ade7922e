"""`network.json` of a checkpoint: all that is needed to load its network and to sample from it.

It is small and has a format of its own, so a key of the config may be renamed or removed and old networks still load.
Checkpoints of before there was such a file say the same in parts of their `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from anyflow_train.config.network import Lora, Student
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError

FORMAT = 1
NAME = "network.json"
TIMES = ("gate_value", "deltatime_type")
CHUNKS = ("chunk_partition", "full_chunk_limit", "compressed_patch_size")


class _Stored(BaseModel):
    """Keys that a later version adds are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


def _adapter(value: Any) -> Any:
    """What this version knows of an adapter; None for `kind: full`."""
    if not isinstance(value, Mapping):
        return value
    known = {name: entry for name, entry in value.items() if name in Lora.model_fields}
    return known if known.get("kind") == "lora" else None


def _tuples(value: Any) -> Any:
    """JSON has no tuples, and constructors take no lists."""
    return {name: tuple(entry) if isinstance(entry, list) else entry for name, entry in dict(value).items()}


class Sampling(_Stored):
    """How clips are sampled.

    any_step: whether the network jumps between any two times; otherwise it takes Euler steps.
    conditioning_frames: whether it was trained to continue given frames.
    frames, height, width: size of the training clips in pixels; None: not known.
    shift: of the times in training.
    """

    any_step: bool = True
    conditioning_frames: bool = True
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    shift: float = 5.0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sampling:
        """What a saved config says, with the default for whatever it does not say."""
        data, context = _part(config, "data"), _part(config, "context")
        known = {name: data.get(name) for name in ("frames", "height", "width")}
        return cls(
            any_step=_part(config, "objective").get("kind") != "flow_matching",
            conditioning_frames=context.get("i2v_probability", 1.0) > 0,
            shift=_part(config, "times").get("shift", 5.0),
            **known,
        )


class Training(_Stored):
    """What a model card says about the training: a few words on the objective, samples per step."""

    objective: str = "unknown"
    global_batch: int = 0


class NetworkFile(_Stored):
    """A trained network, apart from its weights.

    format: of the file.
    run: name of the run.
    arguments: of the network's constructor; the class follows from them.
    adapter: the low-rank adapter that was trained; None if the whole network was trained.
    init: what the network, or its adapter, started from: folder, hub id, run or checkpoint; None: random weights.
    codec: pipeline folder or hub id of the VAE and the text encoder.
    shards: folder of the training data.
    """

    format: int = FORMAT
    run: str = ""
    arguments: Annotated[dict[str, Any], BeforeValidator(_tuples)]
    adapter: Annotated[Lora | None, BeforeValidator(_adapter)] = None
    init: str | None = None
    codec: str | None = None
    shards: str | None = None
    sampling: Sampling = Sampling()
    training: Training = Training()

    @property
    def times(self) -> dict[str, Any]:
        """How the network takes its second time."""
        return {name: self.arguments[name] for name in TIMES}

    @property
    def causal(self) -> dict[str, Any] | None:
        """The arguments of a causal network that others do not have; None if it is not causal."""
        return {name: self.arguments[name] for name in CHUNKS} if CHUNKS[0] in self.arguments else None

    @classmethod
    def of_student(cls, student: Student) -> NetworkFile:
        """The network that a config asks for."""
        times = {name: getattr(student, name) for name in TIMES}
        adapter = student.adapter.model_dump()
        return cls(arguments={**student.architecture.arguments(), **times}, adapter=adapter, init=student.init)  # pyright: ignore[reportArgumentType] # validated

    @classmethod
    def of_run(cls, config: RunConfig) -> NetworkFile:
        """The file that a run writes beside the weights of its student."""
        saved = cls.of_saved(config.model_dump(mode="json"), config.name)
        sampling = saved.sampling.model_copy(update={"any_step": config.objective.any_step})
        training = saved.training.model_copy(update={"objective": config.objective.summary})
        return saved.model_copy(update={"sampling": sampling, "training": training})

    @classmethod
    def of_saved(cls, config: Mapping[str, Any], where: str) -> NetworkFile:
        """What a saved config, which need not be valid, says of its student.

        Raises:
            UserError: it does not say the shape of the network.
        """
        student, teacher = _part(config, "student"), _part(config, "teacher")
        shape = dict(_part(student, "architecture"))
        causal = shape.pop("causal", None) or {}
        times = {name: student[name] for name in TIMES if name in student}
        objective = _part(config, "objective")
        content = {
            "run": config.get("name", ""),
            "arguments": {**shape, **causal, "gate_value": 0.25, "deltatime_type": "r", **times},
            "adapter": student.get("adapter"),
            "init": student.get("init"),
            "codec": teacher.get("codec") or teacher.get("source"),
            "shards": _part(config, "data").get("shards"),
            "sampling": Sampling.of(config),
            "training": {
                "objective": f"{objective.get('kind', 'unknown')}, guidance {objective.get('guidance', 'none')} "
                f"(scale {objective.get('guidance_scale', 1.0):g})",
                "global_batch": _part(config, "engine").get("global_batch", 0),
            },
        }
        if not shape:
            raise UserError(where, "lacks student.architecture, without which its network cannot be built")
        return cls._checked(content, where)

    @classmethod
    def of_file(cls, content: Any, where: str) -> NetworkFile:
        """The content of `network.json`.

        Raises:
            UserError: a newer version wrote it, or it is not such a file.
        """
        written = content.get("format") if isinstance(content, Mapping) else None
        if isinstance(written, int) and written > FORMAT:
            raise UserError(where, f"has format {written}; this version of anyflow_train reads up to {FORMAT}")
        return cls._checked(content, where)

    @classmethod
    def _checked(cls, content: Any, where: str) -> NetworkFile:
        try:
            return cls.model_validate(content)
        except (ValidationError, TypeError, ValueError) as error:
            key = ""
            if isinstance(error, ValidationError):
                key = ".".join(str(part) for part in error.errors(include_url=False)[0]["loc"]) + " "
            raise UserError(where, f"{key}does not describe a network that this version knows") from None


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = config.get(name)
    return part if isinstance(part, Mapping) else {}
