"""Compare a run's student with the network that it starts from, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from anyflow_train.config.network import Architecture, Causal, Student, plain
from anyflow_train.errors import UserError
from anyflow_train.training.checkpoints.network_file import NetworkFile

# Arguments that must be equal for networks that take the same latents and texts.
INTERFACE = ("in_channels", "out_channels", "text_dim")
# Defaults of the networks' constructors.
DEFAULTS = {name: field.default for kind in (Architecture, Causal) for name, field in kind.model_fields.items()}


def made_causal(arguments: Mapping[str, Any], network: NetworkFile) -> Mapping[str, Any]:
    """Add the arguments of a causal network. A network of whole clips can become causal."""
    if network.causal is None:
        return arguments
    # The chunk partition depends on the length of the clips, which may change.
    return {**network.causal, **arguments, "chunk_partition": network.causal["chunk_partition"]}


def differences(student: Student, arguments: Mapping[str, Any], source: str | Path) -> list[UserError]:
    """Compare the config's student with the constructor arguments of a source: one error for each key that differs."""
    wanted = NetworkFile.of_student(student)
    found = {key: plain(value) for key, value in arguments.items()}
    found = {**DEFAULTS, **made_causal(found, wanted)}
    pairs = [(f"student.{name}", value, found[name]) for name, value in wanted.times.items()]
    for name, value in student.architecture.arguments().items():
        part = "architecture" if name in Architecture.model_fields else "architecture.causal"
        pairs.append((f"student.{part}.{name}", value, found[name]))
    errors = mismatches(pairs, source)
    if wanted.causal is None and "chunk_partition" in arguments:
        problem = f"is null, but {source} is a causal student; choose a causal student from configs/student"
        errors.append(UserError("student.architecture.causal", problem))
    return errors


def mismatches(pairs: Iterable[tuple[str, Any, Any]], source: str | Path) -> list[UserError]:
    """Make one error for each (key, value, value of the source) whose values differ."""
    return [
        UserError(key, f"is {value!r}, but {source} was trained with {found!r}; set {key}={found}, or start elsewhere")
        for key, value, found in pairs
        if value != found
    ]


def other_interface(key: str, source: str, arguments: Mapping[str, Any], student: Architecture) -> list[UserError]:
    """Make one error for each argument in which the network of `key` takes other latents or texts than the student."""
    ours = {name: getattr(student, name) for name in INTERFACE}
    theirs = {name: arguments.get(name, value) for name, value in ours.items()}
    return [
        UserError(key, f"{source} has {name}={theirs[name]}, but the student has {value}")
        for name, value in ours.items()
        if theirs[name] != value
    ]
