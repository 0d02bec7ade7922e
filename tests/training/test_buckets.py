"""A run on clips of two sizes, from two folders."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.flow.draw import Draw
from anyflow_train.training import trainer
from anyflow_train.training.checkpoints.reading import list_checkpoints, read_info
from anyflow_train.training.updates import Update, UpdateReport, make_update
from tests.training.helpers import SHAPE, assert_equal_runs, final_tensors, on_policy, settings, train, write_latents


def config(folder: Path, base: Callable[..., dict[str, Any]] = settings, **changes: Any) -> dict[str, Any]:
    """Clips of 9 frames, and pictures, of which a step takes 3 times as many."""
    if not (folder / "clips").exists():
        write_latents(folder / "clips", 12, frames=3)
        write_latents(folder / "pictures", 12, frames=1)
    found = base(folder, **changes)
    shards = {"shards": [str(folder / "clips"), str(folder / "pictures")], "frames": 9}
    return found | {"data": found["data"] | shards | {"buckets": [[9, 32, 32], [1, 32, 32]]}}


def test_a_run_resumes_exactly_and_splits_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Counter[Draw]()

    def recorded(*arguments: Any) -> UpdateReport:
        drawn.update(arguments[4])
        return make_update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_update", recorded)
        whole = train(config(tmp_path, name="whole"))
    assert set(drawn.values()) == {1}  # every global batch of a step has its own random numbers
    train(config(tmp_path, name="parts", steps=3))
    assert_equal_runs(train(config(tmp_path, name="parts")), whole)
    split = train(config(tmp_path, name="split", engine__micro_batch=2))
    tensors, others = final_tensors(whole), final_tensors(split)
    assert all(torch.allclose(tensors[name], others[name], rtol=1e-3, atol=1e-5) for name in tensors)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (whole, split)]
    assert [row["loss"] for row in rows[1]] == pytest.approx([row["loss"] for row in rows[0]], rel=1e-4)
    # Some steps have 8 samples, and some 24.
    state = read_info(list_checkpoints(whole / "checkpoints")[-1]).state
    assert state.samples_seen in range(8 * 8 + 16, 3 * 8 * 8, 16)


@pytest.mark.parametrize("source", ["data", "student"])
def test_stage_2_rolls_out_samples_of_all_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    objective = {"kind": "lagrangian", "source": source, "text_dropout": 0.0}
    seen = Counter[tuple[str, tuple[int, ...], bool]]()

    def recorded(update: Update, *others: Any) -> UpdateReport:
        seen.update(
            (update.role, tuple(batch.latents.shape[1:]), bool(batch.latents.isnan().all())) for batch in others[2]
        )
        return make_update(update, *others)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_update", recorded)
        whole = train(config(tmp_path, on_policy, name="whole", objective=objective))
    sizes = {(frames, *SHAPE[1:]) for frames in (3, 1)}
    assert seen.keys() == {(role, size, source == "student") for role in ("student", "fake_score") for size in sizes}
    train(config(tmp_path, on_policy, name="parts", objective=objective, steps=3))
    assert_equal_runs(train(config(tmp_path, on_policy, name="parts", objective=objective)), whole)
