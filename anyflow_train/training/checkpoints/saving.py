"""Save checkpoints in the background: copy the tensors to memory, and write the copy while the next steps run."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from anyflow_train.config.derived import most_checkpoints
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import NO_ROOM, UserError
from anyflow_train.files import existing_part
from anyflow_train.text import memory_size
from anyflow_train.training.checkpoints.staging import staged
from anyflow_train.training.checkpoints.state import TrainState, list_checkpoints
from anyflow_train.training.checkpoints.tensor_handle import Entry, read_entries
from anyflow_train.training.checkpoints.writing import (
    Tensors,
    mark_best,
    prune_checkpoints,
    save_checkpoint,
    update_state,
)
from anyflow_train.training.processes.host_memory import free_memory
from anyflow_train.training.processes.world import World

# Largest share of the free memory that a copy may take. The rest is left for the data, for the page cache of the files
# being written, and for memory that the training needs later.
COPY_SHARE = 0.5

START_AGAIN = "the previous one is intact; mend that and start again"


class Saver:
    """Writes a run's checkpoints, at most one at a time.

    The tensors are copied to the memory of process 0: one copy of everything that is saved (16 bytes per trained
    parameter: master, average and two moments; 10 bytes with 8-bit moments). A thread writes, checksums, syncs and
    renames it. If a copy would take more than half of the free memory, tensors are streamed to the disk instead, and
    the training waits.

    Args:
        folder: the run's `checkpoints`.
        say: prints a line for the user.
    """

    def __init__(self, config: RunConfig, folder: Path, world: World, say: Callable[[str], object]) -> None:
        self._config = config
        self._folder = folder
        self._world = world
        self._say = say
        self._said: str | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether process 0 could not write the last checkpoint. `wait` raises the reason."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def check_room(self, groups: Mapping[str, Mapping[str, Entry]]) -> None:
        """Warn if the disk does not have the space for all checkpoints that the run keeps."""
        if not self._world.is_main:
            return
        size, found = _size(groups), list_checkpoints(self._folder)
        count = most_checkpoints(self._config)
        place = existing_part(self._folder)
        free, needed = shutil.disk_usage(place).free, size * max(count - len(found), 1)
        if free < needed:
            problem = f"{place} has {memory_size(free)} of free space, but a checkpoint takes {memory_size(size)}"
            advice = f"the run keeps up to {count} of them; free some space, or change checkpoint.keep or keep_every"
            self._say(f"warning: {problem}, and {advice}")

    def save(self, state: TrainState, adam_steps: Mapping[str, int], groups: Mapping[str, Mapping[str, Entry]]) -> None:
        """Save the current tensors. All processes must call it. Waits if the previous checkpoint is still written.

        Args:
            adam_steps: Adam's step count of every trainable role.
            groups: group name -> entries by model name.

        Raises:
            UserError: this checkpoint or the previous one could not be written. Raised on all processes.
        """
        world, size = self._world, _size(groups)
        streams = {group: read_entries(entries) for group, entries in groups.items()}
        with world.activity.untimed("saving"):
            with world.together():
                self._end_last(state.step)
            with world.together():  # reading `streams` communicates, but every process always reads all of them
                if world.is_main:
                    self._begin(state, adam_steps, streams, size)
                else:
                    _read_rest(streams)

    def update(self, state: TrainState) -> None:
        """Replace the state in the checkpoint of its step, after a validation. Does nothing if there is none.

        A thread does it. If it fails, the next `save` or `wait` raises the reason.
        """
        if self._world.is_main:
            self._writing = self._thread.submit(self._update, state, self._writing)

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk. All processes must call it.

        Raises:
            UserError: the last checkpoint could not be written. Raised on all processes.
        """
        with self._world.activity.untimed("saving"), self._world.together():
            self._result()

    def close(self) -> None:
        """Wait for the thread and ignore its result: for a run that ends with another error."""
        self._thread.shutdown()

    def _begin(self, state: TrainState, adam_steps: Mapping[str, int], streams: Tensors, size: int) -> None:
        device, free = self._world.device, free_memory()
        on_gpu = device.type == "cuda"
        on_host = {group: staged(each, device) if on_gpu else each for group, each in streams.items()}
        if size > COPY_SHARE * free:
            problem = (
                f"a copy of {memory_size(size)} would take more than half of the {memory_size(free)} of free memory"
            )
            self._say_once(f"training pauses while checkpoints are written: {problem}")
            try:
                self._write(state, adam_steps, on_host)
            finally:
                _read_rest(streams)  # otherwise the other processes would wait forever
            return
        self._say_once(f"checkpoints are written in the background, from a copy of {memory_size(size)} in memory")
        copies = {group: _drained(deque(each if on_gpu else _copied(each))) for group, each in on_host.items()}
        self._writing = self._thread.submit(self._write, state, adam_steps, copies)

    def _write(self, state: TrainState, adam_steps: Mapping[str, int], groups: Tensors) -> None:
        with self._explained(state):
            save_checkpoint(self._folder, self._config, state, adam_steps, groups)
            self._tidy_up(state)

    def _update(self, state: TrainState, before: Future[None] | None) -> None:
        if before is not None:
            before.result()  # has ended, because there is one thread; raises its error
        with self._explained(state):
            update_state(self._folder, state)
            self._tidy_up(state)

    def _tidy_up(self, state: TrainState) -> None:
        mark_best(self._folder, state.best)
        keeping = self._config.checkpoint
        prune_checkpoints(self._folder, keeping.keep, state.best, keeping.keep_every)

    @contextmanager
    def _explained(self, state: TrainState) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = f"the checkpoint of step {state.step} could not be written ({error.strerror or error})"
            advice = "the previous one is intact; free some space and start again"
            where = error.filename if error.errno not in NO_ROOM and error.filename else self._folder
            raise UserError(str(where), f"{problem}; {advice if error.errno in NO_ROOM else START_AGAIN}") from error
        except Exception as error:  # in the thread, only a UserError reaches all processes
            problem = f"the checkpoint of step {state.step} could not be written ({type(error).__name__}: {error})"
            raise UserError(str(self._folder), f"{problem}; {START_AGAIN}") from error

    def _end_last(self, step: int) -> None:
        if self._writing is None or self._writing.done():
            return self._result()
        start = time.monotonic()
        self._result()
        waited = time.monotonic() - start
        self._say(f"step {step}: waited {waited:.1f} s for the previous checkpoint; increase checkpoint.every")

    def _result(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _say_once(self, text: str) -> None:
        kind, _, _ = text.partition(":")
        if kind != self._said:
            self._say(text)
        self._said = kind


def _size(groups: Mapping[str, Mapping[str, Entry]]) -> int:
    """Bytes of the tensors of a checkpoint."""
    saved = (entry for entries in groups.values() for entry in entries.values())
    return sum(entry.dtype.itemsize * entry.shape.numel() for entry in saved)


def _copied(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _drained(copies: deque[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the copies, and release each one as it is yielded."""
    while copies:
        yield copies.popleft()


def _read_rest(streams: Tensors) -> None:
    """Read the remaining tensors and drop them: every process must take part in reading every tensor."""
    for tensors in streams.values():
        deque(tensors, maxlen=0)
