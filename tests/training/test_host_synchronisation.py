"""A step never waits for the device, but for one read of its numbers at the end of each update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.overrides import TorchFunctionMode, resolve_name
from torch.profiler import ProfilerActivity, profile

from anyflow_train.flow.draw import Draw
from anyflow_train.training.trainer import Trainer
from tests.training.helpers import causal, on_policy, settings, train, write_latents

# What a GPU's host would wait in, to read a number or to learn a shape. A few numbers of its own go to the GPU at once.
WAITS = {
    *(f"Tensor.{name}" for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__")),
    *("Tensor.__index__", "Tensor.__contains__", "Tensor.equal", "Tensor.is_nonzero", "Tensor.unique"),
    *(f"torch.{name}" for name in ("nonzero", "equal", "allclose", "unique", "masked_select")),
}
KERNELS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::unique"}


class Waits(TorchFunctionMode):
    """Counts what would wait, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.on_host = False

    @contextmanager
    def of_the_host(self) -> Iterator[None]:
        """Keep tensors in the host's memory inside the block, also on a machine with a GPU."""
        self.on_host = True
        yield
        self.on_host = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = (resolve_name(func) or "").removeprefix("torch.") if "Tensor" in str(func) else resolve_name(func)
        if not self.on_host and name in WAITS:
            self.found[str(name)] += 1
        return func(*args, **(kwargs or {}))


def gives_a_number(event: Any) -> bool:
    """To the host, but for what a CPU's Adam reads of its own step counts; a GPU's takes them where they are."""
    above = event.cpu_parent
    while above is not None and above.name != "aten::_fused_adamw_":
        above = above.cpu_parent
    return event.name in KERNELS and above is None


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Counter[str], int]]:
    """Return for every step the calls that synchronise, and the number of kernels that return a value to the host."""
    steps: list[tuple[Counter[str], int]] = []
    waits, original = Waits(), Trainer._step

    def on_the_host(function: Any) -> Any:
        def called(*arguments: Any) -> Any:
            with waits.of_the_host():
                return function(*arguments)

        return called

    def step(trainer: Trainer, batches: Any) -> None:
        waits.found = Counter()
        with profile(activities=[ProfilerActivity.CPU]) as profiler, waits:
            original(trainer, batches)
        steps.append((waits.found, sum(gives_a_number(event) for event in profiler.events())))

    monkeypatch.setattr(Draw, "shared", on_the_host(Draw.shared))
    monkeypatch.setattr(Draw, "chances", on_the_host(Draw.chances))
    monkeypatch.setattr(Trainer, "_step", step)
    return steps


@pytest.mark.parametrize(
    ("kind", "precision", "updates"),
    [("stage 2", "bf16", 2), pytest.param("causal", "fp32", 1, marks=pytest.mark.nightly)],
)
def test_a_step_waits_once_for_each_update(
    kind: str, precision: str, updates: int, tmp_path: Path, counted: list[tuple[Counter[str], int]]
) -> None:
    write_latents(tmp_path / "shards", frames=3 if kind == "causal" else 2)
    options = {"steps": 2, "engine__micro_batch": 4, "engine__precision": precision, "checkpoint__every": 100}
    options |= {"objective__guidance": "target", "objective__guidance_scale": 3.0, "objective__text_dropout": 0.5}
    config = on_policy(tmp_path, **options) if kind == "stage 2" else settings(tmp_path, **options)
    train(causal(config) if kind == "causal" else config)
    assert [dict(found) for found, _ in counted] == [{"Tensor.tolist": updates}] * 2
    assert [kernels for _, kernels in counted] == [0] * 2
