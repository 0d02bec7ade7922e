"""A run on clips of two sizes, from two folders."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.flow.draw import Draw
from anyflow_train.training import trainer
from anyflow_train.training.checkpoints.reading import list_checkpoints, read_info
from anyflow_train.training.updates import UpdateReport, make_update
from tests.training.helpers import assert_equal_runs, final_tensors, settings, train, write_latents


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """Clips of 9 frames, and pictures, of which a step takes 3 times as many."""
    if not (folder / "clips").exists():
        write_latents(folder / "clips", 12, frames=3)
        write_latents(folder / "pictures", 12, frames=1)
    found = settings(folder, **changes)
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
