"""Two engines on one shared base, each for its own role, on two processes: as one process does it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor

from anyflow_train.training.world import ALONE
from tests.training import roles_worker
from tests.training.launched import Launch
from tests.training.started import network, trained

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# What they do under each engine begins from a network, and under ZeRO-3 from a run on it too.
CASES = {**dict.fromkeys(("ddp", "zero1", "zero2", "zero3"), "network"), "zero3-run": "run"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes did under every engine."""
    found = tmp_path_factory.mktemp("roles")
    layers = {"student__architecture__num_layers": roles_worker.LAYERS}
    trained(found, "run", network(found, **layers), roles_worker.STUDENT.model_dump(), **layers)
    cases = [
        {"engine": name.partition("-")[0], "source": str(found / source), "out": str(found / f"{name}.safetensors")}
        for name, source in CASES.items()
    ]
    launch = Launch("zero2", cases, found, Path(roles_worker.__file__))
    assert launch.ended() == 0, launch.text()
    return found


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, tuple[list[list[float]], dict[str, Tensor]]]:
    """What one process does, by what it begins from."""
    return {source: roles_worker.train(str(folder / source), ALONE) for source in ("network", "run")}


@pytest.mark.parametrize("case", CASES)
def test_two_roles_train_as_in_one_process(folder: Path, alone: dict, case: str) -> None:
    losses, tensors = alone[CASES[case]]
    with safe_open(folder / f"{case}.safetensors", framework="pt") as file:
        # float32 sums in another order, over six steps of training
        for row, wanted in zip(json.loads(file.metadata()["losses"]), losses, strict=True):
            assert row == pytest.approx(wanted, rel=1e-5)
        assert set(file.keys()) == set(tensors)
        for key, tensor in tensors.items():
            # Magnified by Adam where the second moment is small. A gradient that went astray is an error of tenths.
            assert (file.get_tensor(key) - tensor).norm() <= 1e-4 * tensor.norm(), key
