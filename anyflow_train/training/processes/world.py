"""The processes of a run: who is who, what they share, and how a mistake of one becomes the clear end of all."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from anyflow_train.config.derived import world_size
from anyflow_train.config.run import Engine as EngineConfig
from anyflow_train.devices import pick_device
from anyflow_train.errors import SharedErrors, UserError, UserErrors
from anyflow_train.training.processes.activity import Activity
from anyflow_train.training.processes.launched import local_rank

T = TypeVar("T")

# The heartbeat ends a run that hangs, and names who is behind. Communication waits longer: for what may take long, such
# as a validation, and so that it is not the first to complain.
WAIT = 2
WAIT_MORE = timedelta(seconds=60)


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees it.

    `sequence_parallel` neighbours hold the same samples and split their tokens; so there are
    `size / sequence_parallel` shares of the data.

    Attributes:
        device: of this process.
        rank, size: of this process among all.
        sequence_parallel: processes per sample.
        data_group: the processes at the same place of their sample, one for each share of the data; None: all.
        sequence_group: the processes of this process's samples; None where `sequence_parallel` is 1.
        activity: what this process is at.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    sequence_parallel: int = 1
    data_group: Any = None
    sequence_group: Any = None
    activity: Activity = field(default_factory=Activity)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the terminal."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of every global batch is this process's."""
        return self.rank // self.sequence_parallel

    @property
    def data_size(self) -> int:
        """How many shares a global batch is cut into."""
        return self.size // self.sequence_parallel

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over the shares of the data; with one share the tensor itself."""
        if self.data_size == 1:
            return values
        self.activity.touch()
        total = values.clone()
        dist.all_reduce(total, group=self.data_group)
        return total

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process. Waits for all of them."""
        if self.size == 1:
            return flag
        self.activity.touch()
        count = torch.tensor(float(flag))
        dist.all_reduce(count)
        return bool(count)

    def gather(self, value: T) -> list[T]:
        """One value of every process, by rank. Waits for all of them."""
        if self.size == 1:
            return [value]
        self.activity.touch()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value."""
        if self.size == 1:
            return value
        self.activity.touch()
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def broadcast_tensor(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, in the given one, which has its shape and dtype on every process."""
        if self.size > 1:
            self.activity.touch()
            dist.broadcast(tensor, src=0)
        return tensor

    def together(self, work: Callable[[], T]) -> T:
        """Do a piece of work on every process; if one of them cannot, all raise what it says.

        Raises:
            SharedErrors: as `work` does, here or elsewhere. What not all processes found names those that did.
        """
        if self.size == 1:
            return work()
        result, found = None, []
        try:
            result = work()
        except UserErrors as errors:
            found = [(error.where, error.problem) for error in errors.errors]
        except UserError as error:
            found = [(error.where, error.problem)]
        everywhere = self.gather(found)
        if not any(everywhere):
            return result  # pyright: ignore[reportReturnType]
        errors = [UserError(key, text + self._where(ranks)) for (key, text), ranks in _by_problem(everywhere)]
        raise SharedErrors(errors)

    def on_main(self, work: Callable[[], T]) -> T:
        """Do a piece of work on rank 0 alone; every process gets its result, or its UserErrors."""
        return self.broadcast(self.together(lambda: work() if self.is_main else None))  # pyright: ignore

    def _where(self, ranks: list[int]) -> str:
        # What rank 0 alone looked at, it saw for all.
        if len(ranks) == self.size or ranks == [0]:
            return ""
        return f" (on process {', '.join(map(str, ranks))} of {self.size})"


ALONE = World(torch.device("cpu"))
"""One process on a CPU."""


def start_world(config: EngineConfig) -> World:
    """Choose the device, and join the processes that a launcher started.

    Raises:
        UserError: the processes do not fit the config, or each other.
    """
    device = pick_device(config.device, config.threads, "engine.device", local_rank())
    size = world_size()
    if "MASTER_ADDR" not in os.environ or "RANK" not in os.environ:
        if size > 1:
            raise UserError("WORLD_SIZE", f"is {size}, but MASTER_ADDR or RANK is missing; start with launch/train.sh")
        return World(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=WAIT * timedelta(seconds=config.timeout_seconds) + WAIT_MORE)
        atexit.register(dist.destroy_process_group)
    rank = dist.get_rank()
    if dist.get_world_size() != size:  # some set-ups fall back to a world of one without a word
        raise UserError("WORLD_SIZE", f"is {size}, but {dist.get_world_size()} processes joined")
    width = config.sequence_parallel
    if size % width:
        raise UserError("engine.sequence_parallel", f"is {width}, which does not divide {size} processes")
    return World(device, rank, size, width, *_groups(rank, size, width))


def shared_rows(count: int, world: World) -> list[int]:
    """Which of `count` equal pieces of work are this process's: as many for every one.

    Where they do not come out even the last piece is done more than once: under ZeRO-3 a process that runs fewer
    forwards than the others hangs them all.
    """
    return [min(row, count - 1) for row in range(world.data_rank, count + (-count) % world.data_size, world.data_size)]


def collect_rows(count: int, mine: list[T], world: World) -> list[T]:
    """The results of `shared_rows`, in order, on every process."""
    everyone = world.gather(mine)[:: world.sequence_parallel]
    return [everyone[row % world.data_size][row // world.data_size] for row in range(count)]


def check_agreement(world: World, facts: dict[str, str]) -> None:
    """Compare what must be the same on every process.

    Raises:
        SharedErrors: one line for every fact that some process has otherwise than rank 0.
    """
    everywhere = world.gather(facts)
    names = dict.fromkeys(name for found in everywhere for name in found)
    errors = [UserError(name, problem) for name in names if (problem := _difference(everywhere, name))]
    if errors:
        raise SharedErrors(errors)


def _difference(everywhere: list[dict[str, str]], name: str) -> str | None:
    first, *others = [found.get(name, "nothing") for found in everywhere]
    for rank, value in enumerate(others, start=1):
        if value != first:
            return f"is {first} on process 0, but {value} on process {rank}; give all processes the same"
    return None


def _groups(rank: int, size: int, width: int) -> tuple[Any, Any]:
    """The data group and the sequence group. Every process takes part in the making of all groups."""
    if width == 1:
        return None, None
    places = [dist.new_group(range(place, size, width)) for place in range(width)]
    samples = [dist.new_group(range(first, first + width)) for first in range(0, size, width)]
    return places[rank % width], samples[rank // width]


def _by_problem(everywhere: list[list[tuple[str, str]]]) -> list[tuple[tuple[str, str], list[int]]]:
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, found in enumerate(everywhere):
        for problem in found:
            ranks.setdefault(problem, []).append(rank)
    return list(ranks.items())
