"""Saving beside the training: a copy in memory, which a thread writes while the next steps run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from anyflow_train.training.checkpoints.state import TrainState
from anyflow_train.training.checkpoints.tensor_handle import Entry, read_entries
from anyflow_train.training.checkpoints.writing import mark_best, prune_checkpoints, save_checkpoint
from anyflow_train.training.processes.host_memory import free_memory
from anyflow_train.training.processes.world import World

# A copy may take this share of the memory that is free. The rest is for the data, and for the files on their way to
# the disk; memory that the training itself comes to need later must not be taken away from it.
COPY_SHARE = 0.5

Tensors = Mapping[str, Iterable[tuple[str, Tensor]]]


class Saver:
    """Writes a run's checkpoints, at most one at a time.

    The tensors are copied to the memory of process 0, one whole copy of all that is saved (16 bytes per trained
    parameter: master, average and two moments; 10 with moments in 8 bits). From it a thread writes, checksums, syncs
    and renames. Where a copy would take more than half of the free memory, tensors are streamed to the disk instead,
    and the training waits.

    Args:
        folder: the run's `checkpoints`.
        say: shows a line to people.
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
        """Whether the last checkpoint could not be written, on process 0; `wait` says why."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def save(self, state: TrainState, adam_steps: Mapping[str, int], groups: Mapping[str, Mapping[str, Entry]]) -> None:
        """Save this moment's tensors; all processes must call it. Waits for the checkpoint before, if it must.

        Args:
            adam_steps: Adam's step count of every trainable role.
            groups: group name -> entries by model name.

        Raises:
            UserError: on all processes, this checkpoint or the one before could not be written.
        """
        world = self._world
        saved = (entry for entries in groups.values() for entry in entries.values())
        size = sum(entry.dtype.itemsize * entry.shape.numel() for entry in saved)
        streams = {group: world.activity.touch_each(read_entries(entries)) for group, entries in groups.items()}
        with world.activity.untimed("saving"):
            world.together(lambda: self._end_last(state.step))
            if world.is_main:
                world.together(lambda: self._begin(state, adam_steps, streams, size))
            else:
                world.together(lambda: _take_part(streams))

    def wait(self) -> None:
        """Wait until all is on the disk; all processes must call it.

        Raises:
            UserError: on all processes, the last checkpoint could not be written.
        """
        with self._world.activity.untimed("saving"):
            self._world.together(self._result)

    def close(self) -> None:
        """Wait for the thread, whatever comes of it: for a run that ends with an error of its own."""
        self._thread.shutdown()

    def _begin(self, state: TrainState, adam_steps: Mapping[str, int], streams: Tensors, size: int) -> None:
        free = free_memory()
        if free is not None and size > COPY_SHARE * free:
            problem = f"a copy of {_gib(size)} would take more than half of the {_gib(free)} of free memory"
            self._say_once(f"the training waits until checkpoints are written: {problem}")
            try:
                self._write(state, adam_steps, streams)
            finally:
                _take_part(streams)  # or the others would wait for ever
            return
        self._say_once(f"checkpoints are written beside the training, from a copy of {_gib(size)} in memory")
        copies = {group: _drained(deque(_copied(tensors))) for group, tensors in streams.items()}
        self._writing = self._thread.submit(self._write, state, adam_steps, copies)

    def _write(self, state: TrainState, adam_steps: Mapping[str, int], groups: Tensors) -> None:
        try:
            save_checkpoint(self._folder, self._config, state, adam_steps, groups)
            mark_best(self._folder, state.best)
            prune_checkpoints(self._folder, self._config.checkpoint.keep, state.best)
        except OSError as error:
            problem = f"the checkpoint of step {state.step} could not be written ({error.strerror or error})"
            advice = "the one before is intact, make room and start again"
            raise UserError(str(self._folder), f"{problem}; {advice}") from error

    def _end_last(self, step: int) -> None:
        if self._writing is None or self._writing.done():
            return self._result()
        start = time.monotonic()
        self._result()
        waited = time.monotonic() - start
        self._say(f"step {step}: waited {waited:.1f} s until the checkpoint before was written; save less often")

    def _result(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _say_once(self, text: str) -> None:
        kind = text.partition(":")[0]
        if kind != self._said:
            self._say(text)
        self._said = kind


def _copied(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _drained(copies: deque[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The copies, each forgotten as it is handed out."""
    while copies:
        yield copies.popleft()


def _take_part(streams: Tensors) -> None:
    """Read what is left, and drop it: every process takes part in every reading."""
    for tensors in streams.values():
        deque(tensors, maxlen=0)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
