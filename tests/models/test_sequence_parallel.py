"""Two processes that split the tokens compute the same as one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from tests.models.sequence_cases import CASES, main, run
from tests.training.helpers import in_process

EXACT = sorted(set(CASES) - {"bf16 autocast"})


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the results of two processes for all cases, from one launch for this file."""
    folder = tmp_path_factory.mktemp("sequence")
    processes = [in_process(main, rank, folder) for rank in range(2)]
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0]
    return folder


def found(folder: Path, case: str) -> list[dict[str, Tensor]]:
    """Results of `run` in each process."""
    files = [load_file(folder / f"{rank}.safetensors") for rank in range(2)]
    return [{k.removeprefix(f"{case}/"): v for k, v in file.items() if k.startswith(f"{case}/")} for file in files]


def summed(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: parts[0][name] + parts[1][name] for name in parts[0] if name not in ("output", "tokens")}


@pytest.mark.distributed
@pytest.mark.parametrize("case", EXACT)
def test_outputs_and_summed_gradients_are_those_of_one_process(launched: Path, case: str) -> None:
    whole = run(CASES[case], None)
    parts = found(launched, case)
    assert torch.equal(parts[0].pop("output"), parts[1]["output"])
    # float32 in another order (products of fewer rows, keys in another order), as in the parity with diffusers.
    torch.testing.assert_close(parts[1]["output"], whole.pop("output"), rtol=1e-5, atol=1e-5)
    gradients = summed(parts)
    assert gradients.keys() == whole.keys() - {"tokens"}
    assert (case == "no gradient") == (not gradients)
    for name, gradient in gradients.items():
        assert (gradient - whole[name]).abs().max() <= 2e-5 * whole[name].abs().max(), name


@pytest.mark.distributed
def test_half_precision_strays_no_further_than_in_one_process(launched: Path) -> None:
    case = CASES["bf16 autocast"]
    exact, whole = run(CASES["times per frame"], None), run(case, None)
    parts = found(launched, "bf16 autocast")
    split = summed(parts) | {"output": parts[1]["output"]}
    for name in exact.keys() - {"tokens"}:
        # Roundings differ but have the same size; in a small tensor their root mean square varies.
        assert _distance(split[name], exact[name]) <= 1.5 * _distance(whole[name], exact[name]) + 1e-3, name


def _distance(x: Tensor, exact: Tensor) -> float:
    return float((x.float() - exact).norm() / exact.norm())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "tokens"), [("times per frame", [18, 18]), ("odd number of tokens", [24, 21]), ("no gradient", [18, 18])]
)
def test_each_process_holds_its_part_of_every_frame(launched: Path, case: str, tokens: list[int]) -> None:
    assert [int(part["tokens"]) for part in found(launched, case)] == tokens


@pytest.mark.distributed
def test_what_cannot_be_split_is_refused_by_all_with_the_numbers(launched: Path) -> None:
    first, second = (json.loads((launched / f"{rank}.json").read_text()) for rank in range(2))
    assert first["heads"] == second["heads"] == "3 attention heads cannot be split evenly over 2 processes"
    assert first["positions"] == second["positions"] == "frames of 1 tokens cannot be split over 2 processes"
    assert first["member"] == "accepted"
    assert "not a member of the group" in second["member"]


def test_a_group_of_one_changes_nothing(tmp_path: Path) -> None:
    case = CASES["odd number of tokens"]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        grouped, plain = run(case, dist.group.WORLD), run(case, None)
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(grouped[name], plain[name]) for name in grouped.keys() | plain.keys())
