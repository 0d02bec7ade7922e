"""Two engines on one shared base, each for its own role, on two processes: as one process does it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor

from anyflow_train.models.wan import build_network
from anyflow_train.training.world import ALONE
from tests.training import roles_worker
from tests.training.helpers import settings
from tests.training.launched import Launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ENGINES = ("ddp", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes did under every engine."""
    found = tmp_path_factory.mktemp("roles")
    architecture = settings(found)["student"]["architecture"]
    build_network({**architecture, "num_layers": 2, "gate_value": 0.25}, 3, 0.03).save_pretrained(found / "network")
    cases = [{"engine": e, "source": str(found / "network"), "out": str(found / f"{e}.safetensors")} for e in ENGINES]
    launch = Launch("zero2", cases, found, Path(roles_worker.__file__))
    assert launch.ended() == 0, launch.text()
    return found


@pytest.fixture(scope="module")
def one(folder: Path) -> tuple[list[list[float]], dict[str, Tensor]]:
    """What one process does."""
    return roles_worker.train(str(folder / "network"), ALONE)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_roles_train_as_in_one_process(folder: Path, one: tuple, engine: str) -> None:
    losses, tensors = one
    with safe_open(folder / f"{engine}.safetensors", framework="pt") as file:
        # float32 sums in another order, over six steps of training
        for row, wanted in zip(json.loads(file.metadata()["losses"]), losses, strict=True):
            assert row == pytest.approx(wanted, rel=1e-5)
        assert set(file.keys()) == set(tensors)
        for key, tensor in tensors.items():
            # Magnified by Adam where the second moment is small. A gradient that went astray is an error of tenths.
            assert (file.get_tensor(key) - tensor).norm() <= 1e-4 * tensor.norm(), key
