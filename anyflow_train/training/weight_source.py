"""Open the weights of a network: in diffusers' layout, or of a run and everything that it started from.

All code reads weights through `WeightSource.read(name)`, one by one. Opening a source reads no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Size, Tensor, device

from anyflow_train.config.network import STUDENT_TIMES, Lora, Student
from anyflow_train.config.original import is_weights_file
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError, raise_all
from anyflow_train.models.adapters import add_lora, trainable_parameters
from anyflow_train.models.build import build_described
from anyflow_train.models.pretrained import PretrainedWeights, open_pretrained
from anyflow_train.models.weight_files import read_weight
from anyflow_train.training.checkpoints.config_file import under_new_names
from anyflow_train.training.checkpoints.inputs import network_fact
from anyflow_train.training.checkpoints.network_file import NetworkFile
from anyflow_train.training.checkpoints.reading import (
    DamagedCheckpoint,
    check_shapes,
    open_tensors,
    read_network,
    resolve_checkpoint,
    verify_group,
)
from anyflow_train.training.checkpoints.run_directory import RunDirectory
from anyflow_train.training.checkpoints.state import is_run
from anyflow_train.training.differences import differences, made_causal

T = TypeVar("T")


@dataclass(frozen=True)
class TrainedWeights:
    """Weights that a run trained, by model name. They are read when they are needed.

    Attributes:
        path: folder of the checkpoint.
        network: description of the trained network.
        tensors: model name -> function that reads the weight.
    """

    path: Path
    network: NetworkFile
    tensors: Mapping[str, Callable[[], Tensor]]

    def replaced(self, name: str, weight: Tensor) -> Tensor:
        """Return the trained weight of this name, float32, or the given weight of the base if it was not trained."""
        return self.tensors[name]().float() if name in self.tensors else weight

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight of the base with everything that was trained merged into it, float32."""
        path, lora = name.removesuffix(".weight"), self.network.adapter
        if lora is None or f"{path}.lora_A.weight" not in self.tensors:
            return self.replaced(name, weight)
        first, second = (self.tensors[key]() for key in (f"{path}.lora_{side}.weight" for side in "AB"))
        return weight + (second.float() @ first.float()) * (lora.alpha / lora.rank)


@dataclass(frozen=True)
class WeightSource:
    """The weights of a network. They are read when they are needed.

    Attributes:
        source: folder, hub id or checkpoint of the root.
        root: first network of a chain of runs, in diffusers' layout or from a run that trained the whole network.
        parts: adapters to merge into the root, in order.
        adapter: the adapter on top, which is not merged; None if there is none.
    """

    source: str
    root: PretrainedWeights
    parts: tuple[TrainedWeights, ...] = ()
    adapter: TrainedWeights | None = None

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Arguments of the network's constructor."""
        return self.root.arguments

    @property
    def base(self) -> str:
        """Base of the adapter: folder, hub id or checkpoint."""
        return str(self.parts[-1].path) if self.parts else self.source

    def read(self, name: str) -> Tensor:
        """Read a weight of the network without `adapter`, float32, on the CPU."""
        weight = self.root.read(name)
        for part in self.parts:
            weight = part.merged(name, weight)
        return weight

    def read_trained(self, name: str) -> Tensor:
        """Read a weight like `read`, but take modules that the adapter trains whole from the adapter."""
        weight = self.read(name)
        return weight if self.adapter is None else self.adapter.replaced(name, weight)

    def merged(self) -> WeightSource:
        """Return the network with its adapter merged into the weights."""
        return self if self.adapter is None else replace(self, parts=(*self.parts, self.adapter), adapter=None)


def open_student_start(student: Student) -> WeightSource:
    """Open `student.init`. If it is a run with the student's kind of adapter, its adapter is not merged.

    Raises:
        UserErrors: it cannot be loaded, or its shape or times differ from the student's.
    """
    start = _explained("student.init", lambda: _base_of_adapter(NetworkFile.of_student(student), ()))
    raise_all(differences(student, start.arguments, str(student.init)))
    return start


def open_source(source: str | Path, weights: str = "ema", wan_times: Mapping[str, Any] = STUDENT_TIMES) -> WeightSource:
    """Open the network of any source. The adapter of a run is not merged (see `WeightSource.merged`).

    Args:
        source: Wan2.1 or AnyFlow pipeline folder, transformer folder or hub id; file of original Wan2.1 weights; run
            directory (its best checkpoint, else its latest) or checkpoint folder.
        weights: `ema` or `raw` weights of a run. The base of its adapter always has averaged weights.
        wan_times: `gate_value` and `deltatime_type` of a network that is built from a Wan2.1 transformer.

    Raises:
        UserError: there is no such network, it is damaged, or its base is missing.
    """
    if is_run(source):
        return _of_run(_trained(str(source), "ema" if weights == "ema" else "weights", ()), ())
    path = Path(source).expanduser()
    source = str(path if path.exists() else source)
    return WeightSource(_name(source), open_pretrained(source, wan_times=wan_times))


def open_role(key: str, source: str) -> WeightSource:
    """Open the network of a role other than the student. The adapters of a run are merged.

    Args:
        key: config key that names the source, for errors.

    Raises:
        UserError: it cannot be loaded.
    """
    return _explained(key, lambda: open_source(source).merged())


def open_base(network: NetworkFile) -> WeightSource:
    """Open the network that a run started from, also if the run trained all of it. Its adapters are merged.

    Raises:
        UserError: it is missing or damaged.
    """
    return _base_of_adapter(network, ()).merged()


def base_of(network: NetworkFile) -> str | None:
    """Folder, hub id or checkpoint of a network's start, or of its adapter's base. None for random weights."""
    return network.init if network.init is None or network.adapter is None else _base_of_adapter(network, ()).base


def resolve_init_checkpoint(config: RunConfig, directory: RunDirectory) -> RunConfig:
    """Replace a run directory in `student.init`, and an equal `teacher.source`, by one of its checkpoints.

    The best checkpoint of a run directory may change. A run that has started before keeps its first choice, so that a
    requeued job and an export find the same base.

    Raises:
        UserError: the run directory contains no checkpoint.
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
        saved = under_new_names(directory.read_config() or {}, str(directory.path))
        begun = Path(saved["student"]["init"])
        moved = init / "checkpoints" / begun.name
        if begun == moved or network_fact(str(moved)) == directory.read_inputs()["student.init"]:
            return moved
    return None


def _name(source: str) -> str:
    """Name of a folder, a file of weights or a hub id, equal for all spellings of a path."""
    return str(Path(source).resolve()) if Path(source).is_dir() or is_weights_file(source) else source


def _of_run(trained: TrainedWeights, seen: tuple[Path, ...]) -> WeightSource:
    """Open the network that a run trained. Its adapter is not merged."""
    if trained.network.adapter is not None:
        return replace(_base_of_adapter(trained.network, (*seen, trained.path)), adapter=trained)
    return WeightSource(str(trained.path), PretrainedWeights(trained.network.arguments, trained.tensors))


def _base_of_adapter(network: NetworkFile, seen: tuple[Path, ...]) -> WeightSource:
    """Open the base of a network's adapter, and the adapter that the training started from, if there is one."""
    source = str(network.init)
    if is_run(source):
        before = _trained(source, "ema", seen)
        if _same_adapter(before.network.adapter, network.adapter):
            below = replace(_base_of_adapter(before.network, (*seen, before.path)), adapter=before)
        else:
            below = _of_run(before, seen).merged()
    else:
        try:
            below = WeightSource(_name(source), open_pretrained(source, network.times, network.causal))
        except UserError as error:
            if not seen:
                raise
            problem = f"was trained on {source}, which is missing or has changed: {error}"
            raise UserError(str(seen[-1]), problem) from error
    return replace(below, root=replace(below.root, arguments=made_causal(below.arguments, network)))


def _trained(source: str, group: str, seen: tuple[Path, ...]) -> TrainedWeights:
    """Open the trained weights of a run or checkpoint.

    Args:
        group: group of tensors, `ema` or `weights`.
        seen: checkpoints that were trained on this one.

    Raises:
        UserError: the checkpoint is damaged, or it is its own base.
    """
    path = resolve_checkpoint(source).resolve()
    if path in seen:
        raise UserError(str(path), f"started from itself: {' <- '.join(map(str, (*seen, path)))}")
    try:
        network = read_network(path)
        verify_group(path, group)
        files = open_tensors(path, group)
    except DamagedCheckpoint as damage:
        raise UserError(str(path), f"is damaged: {damage}") from damage
    check_shapes(path, group, _trained_shapes(network, path))
    return TrainedWeights(path, network, {name: partial(read_weight, file, name, path) for name, file in files.items()})


def _trained_shapes(network: NetworkFile, path: Path) -> dict[str, Size]:
    """Shapes of all weights that a run trains, by model name. `path` is its checkpoint, for errors."""
    built = build_described(network.arguments, path)
    if network.adapter is not None:
        with device("meta"):
            add_lora(built, network.adapter, 0)
    return {name: parameter.shape for name, parameter in trainable_parameters(built).items()}


def _same_adapter(one: Lora | None, other: Lora | None) -> bool:
    """Whether two runs train adapters with the same parameters and the same scale."""
    rows = [lora and (lora.rank, lora.alpha, set(lora.targets), set(lora.full_modules)) for lora in (one, other)]
    return one is not None and rows[0] == rows[1]


def _explained(key: str, work: Callable[[], T]) -> T:
    try:
        return work()
    except UserError as error:
        raise UserError(key, str(error)) from error
