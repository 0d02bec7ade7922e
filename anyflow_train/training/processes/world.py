"""The processes of a run: ranks and groups, communication, and errors that end all processes together."""

from __future__ import annotations

import atexit
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage] (documented)
    Store,  # pyright: ignore[reportPrivateImportUsage]
    rendezvous,  # pyright: ignore[reportPrivateImportUsage]
)

from anyflow_train.config.derived import world_size
from anyflow_train.config.run import Engine as EngineConfig
from anyflow_train.devices import pick_device
from anyflow_train.errors import SharedErrors, UserError, raise_all
from anyflow_train.training.processes.activity import Activity
from anyflow_train.training.processes.launched import local_rank

T = TypeVar("T")

# The heartbeat ends a run that hangs, and names the process that hangs. Collectives have a longer timeout, so that they
# can wait for slow work such as a validation, and so that the heartbeat reports first.
WAIT = 2
WAIT_MORE = timedelta(seconds=60)


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    `sequence_parallel` neighbouring processes hold the same samples and split their tokens. So the data are split into
    `size / sequence_parallel` shares.

    Attributes:
        device: device of this process.
        rank: number of this process, from 0.
        size: number of processes.
        sequence_parallel: processes per sample.
        data_group: processes that hold the same part of their samples, one per share of the data; None means all.
        sequence_group: processes that hold the same samples as this one; None if `sequence_parallel` is 1.
        activity: what this process is doing, for the heartbeat.
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
        """Index of this process's share of every global batch."""
        return self.rank // self.sequence_parallel

    @property
    def data_size(self) -> int:
        """Number of shares of a global batch."""
        return self.size // self.sequence_parallel

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum a small tensor over the shares of the data. Returns the tensor itself if there is one share."""
        if self.data_size == 1:
            return values
        self.activity.touch()
        total = values.clone()
        dist.all_reduce(total, group=self.data_group)
        return total

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process. All processes must call it."""
        return any(self.gather(flag))

    def gather(self, value: T) -> list[T]:
        """Collect one value from every process, by rank. All processes must call it."""
        if self.size == 1:
            return [value]
        self.activity.touch()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every process."""
        return self.gather(value)[0]

    def broadcast_tensor(self, tensor: Tensor) -> Tensor:
        """Copy rank 0's tensor into the given one, which has the same shape and dtype on every process."""
        if self.size > 1:
            self.activity.touch()
            dist.broadcast(tensor, src=0)
        return tensor

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block on every process. If one process raises UserErrors, all of them raise these at the block's end.

        An OSError of one of several processes counts as a UserError. The block must not communicate. A process that
        raised has left its block, and waits for the others at the end.

        Raises:
            SharedErrors: the block raised a UserError, here or on another process. If only some processes raised it,
                the message lists them.
        """
        if self.size == 1:
            yield
            return
        found: list[tuple[str, str]] = []
        try:
            yield
        except UserError as errors:
            found = [(error.where, error.problem) for error in errors.errors]
        except OSError as error:
            problem = UserError.of_file(error, "a file")
            found = [(problem.where, problem.problem)]
        ranks: dict[tuple[str, str], list[int]] = {}
        for rank, problems in enumerate(self.gather(found)):
            for problem in problems:
                ranks.setdefault(problem, []).append(rank)
        if ranks:
            raise SharedErrors([UserError(key, text + self._where(on)) for (key, text), on in ranks.items()])

    def on_main(self, work: Callable[[], T]) -> T:
        """Call a function on rank 0 only. Every process gets its result, or its UserErrors."""
        result: Any = None
        with self.together():
            if self.is_main:
                result = work()
        return self.broadcast(result)

    def _where(self, ranks: list[int]) -> str:
        # Errors of rank 0 only usually come from `on_main`, so they concern all processes.
        if len(ranks) == self.size or ranks == [0]:
            return ""
        return f" (on process {', '.join(map(str, ranks))} of {self.size})"


ALONE = World(torch.device("cpu"))
"""One process on a CPU."""


def start_world(config: EngineConfig) -> World:
    """Choose the device, and join the processes that a launcher started.

    Raises:
        UserError: the launcher's variables contradict each other or the config.
    """
    device = pick_device(config.device, config.threads, "engine.device", local_rank())
    size = world_size()
    if "MASTER_ADDR" not in os.environ or "RANK" not in os.environ:
        if size > 1:
            raise UserError("WORLD_SIZE", f"is {size}, but MASTER_ADDR or RANK is missing; start with launch/train.sh")
        return World(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank = _meet(size, config.timeout_seconds), int(os.environ["RANK"])
        patience = WAIT * timedelta(seconds=config.timeout_seconds) + WAIT_MORE
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        atexit.register(dist.destroy_process_group)
    rank = dist.get_rank()
    if dist.get_world_size() != size:  # some environments silently fall back to one process
        raise UserError("WORLD_SIZE", f"is {size}, but {dist.get_world_size()} processes joined")
    width = config.sequence_parallel
    if size % width:
        raise UserError("engine.sequence_parallel", f"is {width}, which does not divide {size} processes")
    return World(device, rank, size, width, *_groups(rank, size, width))


def shared_rows(count: int, world: World) -> list[int]:
    """Indices of this process's share of `count` equal pieces of work. Every process gets the same number of pieces.

    If `count` cannot be divided evenly, several processes do the last piece. Under ZeRO-3 all processes must run the
    same number of forwards, otherwise the run hangs.
    """
    return [min(row, count - 1) for row in range(world.data_rank, count + (-count) % world.data_size, world.data_size)]


def collect_rows(count: int, mine: list[T], world: World) -> list[T]:
    """Collect the results for the indices of `shared_rows` from all processes, in order, on every process."""
    everyone = world.gather(mine)[:: world.sequence_parallel]
    return [everyone[row % world.data_size][row // world.data_size] for row in range(count)]


def check_agreement(world: World, facts: dict[str, str]) -> None:
    """Check that facts, by name, are equal on every process.

    Raises:
        SharedErrors: one line for every fact that differs between rank 0 and another process.
    """
    everywhere = world.gather(facts)
    errors = []
    for name in dict.fromkeys(name for found in everywhere for name in found):
        first, *others = [found.get(name, "nothing") for found in everywhere]
        for rank, value in enumerate(others, start=1):
            if value != first:
                problem = f"is {first} on process 0, but {value} on process {rank}; give all processes the same"
                errors.append(UserError(name, problem))
                break
    raise_all(errors, SharedErrors)


def _meet(size: int, seconds: float) -> Store:
    """Connect to the launcher's store. Returns a part of it that only the processes of this start use.

    A launcher that restarts its processes may keep its store. Addresses of the ended processes are still in there.

    Raises:
        UserError: there is no store, or a process does not come within `seconds`.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
    if place.endswith(":0"):
        problem = "is 0, so that the processes cannot find each other; use torchrun --standalone, or name a free port"
        raise SharedErrors([UserError("MASTER_PORT", problem)])
    try:
        store, rank, _ = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
        return PrefixStore(agree_on_start(store, rank, size, seconds), store)
    except dist.DistError as error:
        problem = f"the processes did not find each other at {place} within {seconds:.0f} s"
        raise UserError(
            "MASTER_ADDR", f"{problem}; start all of them with the same address and port ({error})"
        ) from None


def agree_on_start(store: Store, rank: int, size: int, seconds: float) -> str:
    """Return a name for this start of all processes, which no earlier start on the same store had.

    Each process writes a random word, and process 0 answers it. Words of earlier starts get an answer that is not read.

    Raises:
        UserError: a process does not come within `seconds`.
        DistError: process 0 does not answer, or the store has ended.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"here/{rank}", own)
        start = store.get(f"answer/{own}").decode()
        store.set(f"{start}/{rank}", "")
        return start
    deadline, missing = time.monotonic() + seconds, set(range(1, size))
    while missing:
        for other in [other for other in missing if store.check([f"here/{other}"])]:
            store.set(f"answer/{store.get(f'here/{other}').decode()}", own)
        missing = {other for other in missing if not store.check([f"{own}/{other}"])}
        if time.monotonic() > deadline:
            names = ", ".join(map(str, sorted(missing)))
            raise UserError("WORLD_SIZE", f"is {size}, but process {names} did not start within {seconds:.0f} s")
        time.sleep(0.02)
    return own


def _groups(rank: int, size: int, width: int) -> tuple[Any, Any]:
    """Create the data group and the sequence group of a process. Every process must help to create all groups."""
    if width == 1:
        return None, None
    places = [dist.new_group(range(place, size, width)) for place in range(width)]
    samples = [dist.new_group(range(first, first + width)) for first in range(0, size, width)]
    return places[rank % width], samples[rank // width]
