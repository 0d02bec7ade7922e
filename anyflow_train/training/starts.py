"""What a network starts from: a network in diffusers' layout, or a run of ours, which may have started from another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from anyflow_train.config.network import Architecture, Causal, Lora, Student
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.models.stored import StoredNetwork, open_network
from anyflow_train.training.checkpoints.reading import DamagedCheckpoint, open_tensors, read_info, resolve_checkpoint
from anyflow_train.training.checkpoints.run_directory import RunDirectory

TIMES = ("gate_value", "deltatime_type")
LAYOUT = ("full_chunk_limit", "compressed_patch_size")


@dataclass(frozen=True)
class TrainedWeights:
    """What a run trained: its averaged weights, by model name. Nothing has been read yet.

    Attributes:
        path: of the checkpoint.
        config: of the run.
        files: the open file of every tensor.
    """

    path: Path
    config: RunConfig
    files: Mapping[str, Any]

    @property
    def adapter(self) -> Lora | None:
        """None for a run that trained the whole network."""
        adapter = self.config.student.adapter
        return adapter if isinstance(adapter, Lora) else None

    def whole(self, name: str, weight: Tensor) -> Tensor:
        """A weight of the network below, or what was trained in its place."""
        return self.files[name].get_tensor(name).float() if name in self.files else weight

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """A weight with what was trained added to it, float32."""
        path = name.removesuffix(".weight")
        if self.adapter is None or f"{path}.lora_A.weight" not in self.files:
            return self.whole(name, weight)
        first, second = (self.files[key].get_tensor(key) for key in (f"{path}.lora_{side}.weight" for side in "AB"))
        return weight + (second.float() @ first.float()) * (self.adapter.alpha / self.adapter.rank)


@dataclass(frozen=True)
class Start:
    """A network to start from. Nothing has been read yet.

    Attributes:
        source: of the root: folder, hub id or checkpoint.
        root: the first network of a chain of runs: from diffusers' layout, or of a run that trained all of it.
        parts: adapters to be merged into it, in their order.
        adapter: the run whose adapter goes on being trained on that; None: a new one begins.
    """

    source: str
    root: StoredNetwork
    parts: tuple[TrainedWeights, ...] = ()
    adapter: TrainedWeights | None = None

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Of the network's constructor."""
        return self.root.arguments

    def read(self, name: str) -> Tensor:
        """A weight of what the adapter sits on, float32, on the CPU."""
        weight = self.root.read(name)
        for part in self.parts:
            weight = part.merged(name, weight)
        return weight

    def read_trained(self, name: str) -> Tensor:
        """The same, but of the modules that the adapter trains whole."""
        weight = self.read(name)
        return weight if self.adapter is None else self.adapter.whole(name, weight)


def is_run(source: str) -> bool:
    """Whether a source is a run directory or a checkpoint folder."""
    path = Path(source).expanduser()
    return (path / "checkpoints").is_dir() or (path / "state.json").is_file()


def open_student_start(student: Student) -> Start:
    """What `student.init` names. A run with the same adapter hands it on; any other gives merged weights.

    Raises:
        UserErrors: it cannot be loaded, or has another shape or other times than the student.
    """
    source = str(student.init)
    if not is_run(source):
        start = _explained("student.init", lambda: _plain(source, student))
        _check_shape(start.arguments, student, source)
        return start
    before = _explained("student.init", lambda: _trained(source, ()))
    trained = before.config.student
    times = [(f"student.{name}", getattr(student, name), getattr(trained, name)) for name in TIMES]
    raise_all(mismatches(times, before.path))
    _check_shape(_made_causal(trained.architecture.arguments(), student), student, source)
    start = _explained("student.init", lambda: _below(student, ()))
    return replace(start, root=replace(start.root, arguments=_made_causal(start.arguments, student)))


def open_source(key: str, source: str) -> Start:
    """The network of a source, for a role that is not the student: of a run, its merged weights.

    Args:
        key: config key that names the source, for errors.

    Raises:
        UserError: it cannot be loaded.
    """
    return _explained(key, lambda: _weights(source, None, ()))


def _made_causal(arguments: Mapping[str, Any], student: Student) -> Mapping[str, Any]:
    """A network whose frames were made together can become causal; what it lacks it makes of what it has."""
    causal = student.architecture.causal
    if causal is None:
        return arguments
    # The partition is that of the clips, which may be others than before.
    same = {} if "chunk_partition" not in arguments else {name: arguments[name] for name in LAYOUT}
    return {**arguments, **causal.model_dump(), **same}


def base_of(student: Student) -> str | None:
    """What a student began as, or what its adapter sits on: folder, hub id or checkpoint; None for random weights."""
    if student.init is None or not isinstance(student.adapter, Lora):
        return student.init
    start = open_student_start(student)
    return str(start.parts[-1].path) if start.parts else start.source


def resolve_init_checkpoint(config: RunConfig, directory: RunDirectory) -> RunConfig:
    """The config with one checkpoint for its start, where it names a run directory, whose best may change; also for a
    teacher of the same name.

    The checkpoint is the one that the run began with, if it did. So a requeued job, and an export, find the same base.

    Raises:
        UserError: the run directory holds none.
    """
    init = config.student.init
    if init is None or not (Path(init).expanduser() / "checkpoints").is_dir():
        return config
    chosen = str(_init_of_first_start(directory, Path(init).expanduser()) or resolve_checkpoint(init))
    student = config.student.model_copy(update={"init": chosen})
    teacher = config.teacher.model_copy(update={"source": chosen} if config.teacher.source == init else {})
    return config.model_copy(update={"student": student, "teacher": teacher})


def _init_of_first_start(directory: RunDirectory, init: Path) -> Path | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        begun = Path(directory.read_config()["student"]["init"])
        if begun.parent == init / "checkpoints":
            return begun
    return None


def _plain(source: str, times: Student | None) -> Start:
    """A network in diffusers' layout."""
    given = (None, None) if times is None else (times.gate_value, times.deltatime_type)
    try:
        name = str(Path(source).resolve()) if Path(source).is_dir() else source
        causal = None if times is None else times.architecture.causal
        return Start(name, open_network(source, *given, None if causal is None else causal.model_dump()))
    except UserError as error:
        if times is None:
            raise
        asked = ", ".join(f"student.{name}={getattr(times, name)}" for name in TIMES)
        raise UserError(error.where, f"{error.problem} (asked for: {asked})") from error


def _weights(source: str, times: Student | None, seen: tuple[Path, ...]) -> Start:
    """The whole network of a source, with all that was trained merged."""
    if not is_run(source):
        return _plain(source, times)
    trained = _trained(source, seen)
    if trained.adapter is not None:
        below = _below(trained.config.student, (*seen, trained.path))
        return Start(below.source, below.root, (*below.parts, trained))
    student = trained.config.student
    arguments = {**student.architecture.arguments(), **{name: getattr(student, name) for name in TIMES}}
    weights = {name: (file, name) for name, file in trained.files.items()}
    return Start(str(trained.path), StoredNetwork(arguments, weights))


def _below(student: Student, seen: tuple[Path, ...]) -> Start:
    """What a student's adapter sits on."""
    source = str(student.init)
    if is_run(source):
        before = _trained(source, seen)
        if before.adapter is not None and isinstance(student.adapter, Lora) and _alike(before.adapter, student.adapter):
            below = _below(before.config.student, (*seen, before.path))
            return Start(below.source, below.root, below.parts, before)
    try:
        return _weights(source, student, seen)
    except UserError as error:
        if seen and not is_run(source):
            raise UserError(str(seen[-1]), f"was trained on {source}, which is missing or changed: {error}") from error
        raise


def _trained(source: str, seen: tuple[Path, ...]) -> TrainedWeights:
    """Raises UserError: the checkpoint is damaged, or stands for itself."""
    path = resolve_checkpoint(source).resolve()
    if path in seen:
        raise UserError(str(path), f"is a start of itself: {' <- '.join(map(str, (*seen, path)))}")
    try:
        return TrainedWeights(path, RunConfig.model_validate(read_info(path).config), open_tensors(path, "ema"))
    except DamagedCheckpoint as damage:
        raise UserError(str(path), f"is damaged: {damage}") from damage


def _alike(one: Lora, other: Lora) -> bool:
    """Whether two adapters have the same parameters, and use them alike."""
    rows = [(lora.rank, lora.alpha, set(lora.targets), set(lora.full_modules)) for lora in (one, other)]
    return rows[0] == rows[1]


def _explained(key: str, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except UserError as error:
        raise UserError(key, str(error)) from error


def _check_shape(actual: Mapping[str, Any], student: Student, source: str) -> None:
    """Raises UserErrors: one line for every difference, with the config's value and the file's."""
    errors = []
    for name, value in student.architecture.arguments().items():
        is_own = name in Architecture.model_fields
        fields = Architecture.model_fields if is_own else Causal.model_fields
        found = actual.get(name, fields[name].default)  # the constructor's own
        found = tuple(found) if isinstance(found, list) else found
        if found != value:
            problem = f"is {value!r}, but {source} was made with {found!r}"
            errors.append(UserError(f"student.architecture.{name if is_own else f'causal.{name}'}", problem))
    if student.architecture.causal is None and "chunk_partition" in actual:
        problem = f"is null, but {source} is a causal student; choose a student of configs/student that is causal too"
        errors.append(UserError("student.architecture.causal", problem))
    raise_all(errors)


def mismatches(pairs: Iterable[tuple[str, Any, Any]], source: str | Path) -> list[UserError]:
    """One error for each (key, value, value of the source) that differ."""
    return [
        UserError(key, f"is {value!r}, but {source} was trained with {found!r}; set {key}={found}, or another start")
        for key, value, found in pairs
        if value != found
    ]


def raise_all(errors: list[UserError]) -> None:
    """Raises UserErrors if there is one."""
    if errors:
        raise UserErrors(errors)
