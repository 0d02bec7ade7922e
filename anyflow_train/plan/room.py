"""Whether a run fits on the GPUs that it is about to start on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from anyflow_train.plan.fit import nearest_fit
from anyflow_train.plan.memory import GIB, plan_memory


@dataclass(frozen=True)
class Room:
    """Memory of one process's GPU.

    Attributes:
        host: the machine's name.
        free, total: bytes.
    """

    host: str
    free: int
    total: int


def shortage(config: RunConfig, engine: str, rooms: Sequence[Room]) -> str | None:
    """What to warn of before a run starts; None where it should fit.

    A warning compares all that is planned with what is free. It is no more than that: activations are an estimate, and
    who holds the rest may be about to leave. Beyond doubt is only what stays on the GPU from step to step, since that
    follows from shapes that are known, against the whole GPU.

    Args:
        engine: a file of `launch/`.
        rooms: of every process, by rank.

    Raises:
        UserError: no step can fit on one of the GPUs, however empty it is.
    """
    world = len(rooms)
    memory = plan_memory(config, engine, world)
    lasting = sum(size for _, size in memory.state) - memory.assumed
    smallest = min(range(world), key=lambda rank: rooms[rank].total)
    if lasting > rooms[smallest].total:
        problem = (
            f"{_gib(lasting)} stay on each GPU from step to step (planned, {engine} on {world}), and "
            f"{_where(smallest, rooms)} has {_gib(rooms[smallest].total)}"
        )
        raise UserError("GPU memory", f"{problem}; {_advice(config, engine, world, rooms[smallest].total)}")
    fullest = min(range(world), key=lambda rank: rooms[rank].free)
    room = rooms[fullest]
    if memory.total <= room.free:
        return None
    problem = (
        f"GPU memory may not suffice: {_gib(memory.total)} are planned ({engine} on {world}), "
        f"{_gib(memory.total - room.free)} more than {_where(fullest, rooms)} has free of its {_gib(room.total)}"
    )
    return f"{problem}; {_advice(config, engine, world, room.free)}"


def _advice(config: RunConfig, engine: str, world: int, limit: int) -> str:
    found = nearest_fit(config, None, engine, world, limit)
    if found is None:
        return "nothing but more or larger GPUs helps, or student/adapter=lora; see anyflow plan"
    setting, memory = found
    words = [change for change in setting.changes if not change.startswith("engine=")]
    if setting.engine != engine:
        words.insert(0, f"launch/train.sh {setting.engine}")
    return f"the nearest setting that fits ({_gib(memory.total)}): {' '.join(words)}"


def _where(rank: int, rooms: Sequence[Room]) -> str:
    return f"process {rank} ({rooms[rank].host})"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
