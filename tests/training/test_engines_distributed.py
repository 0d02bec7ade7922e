"""Equal losses, averages, weights and moments under every strategy of the launcher and any number of processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anyflow_train.config.compose import compose
from anyflow_train.training import run as training
from anyflow_train.training.checkpoints.reading import list_checkpoints
from tests.conftest import BITSANDBYTES, asked_for, with_nightly
from tests.training.helpers import assert_equal_runs, final_tensors, settings, write_latents, write_networks
from tests.training.launched import Launch, fork
from tests.training.words import LAYERS, ROOT, words

# One launch does nearly all: it takes half a minute on a quiet machine, and many on a busy one.
LONGEST = 1500
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(LONGEST)]

# Steps of a run, and of a part of one. The averages begin with the last one; an epoch ends within the third.
STEPS, PART = 4, 2
# Under ZeRO the averages are swapped into the shards for the derivative: the hardest of the choices.
AVERAGE = {"kind": "flow_map", "derivative_network": "ema"}
TEACHER = {**AVERAGE, "velocity": "teacher"}
# Objectives of the kinds of run that have their own. The mix is guided and has points of its own.
MIXED = {"kind": "mixed", "source": "student", "guidance": "target", "guidance_scale": 3.0, "text_dropout": 0.4}
OBJECTIVES = {"teacher": TEACHER, "mixed": MIXED, "jvp": {**TEACHER, "derivative": "jvp"}}
LORA = {"kind": "lora", "rank": 2, "alpha": 2.0, "full_modules": ["delta_embedder"]}
# Engine, kind of run, and what else is another than in the run of one process.
EQUAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddp": ("ddp", "full", {"engine__micro_batch": 4}),
    "ddp-accumulated": ("ddp", "full", {"engine__micro_batch": 1}),
    "zero1": ("zero1", "full", {"engine__micro_batch": 2}),
    "zero2": ("zero2", "full", {"engine__micro_batch": 2}),
    "zero2-lora": ("zero2", "lora", {"engine__micro_batch": 2}),
    "zero3": ("zero3", "full", {"engine__micro_batch": 2}),
    "ddp-sequence": ("ddp", "full", {"engine__micro_batch": 4, "engine__sequence_parallel": 2}),
    "zero2-sequence": ("zero2", "lora", {"engine__micro_batch": 4, "engine__sequence_parallel": 2}),
    "zero3-teacher": ("zero3", "teacher", {"engine__micro_batch": 4}),
    "zero3-mixed": ("zero3", "mixed", {"engine__micro_batch": 2}),
    "ddp-jvp": ("ddp", "jvp", {"engine__micro_batch": 2}),
    "zero3-sequence": ("zero3", "full", {"engine__micro_batch": 4, "engine__sequence_parallel": 2}),
    "offload": ("zero3_offload", "full", {"engine__micro_batch": 2}),
}
# The others have the same engine, kind and split, two at a time. `ddp-jvp` accumulates under DDP; runs with adapters,
# and a teacher beside them under ZeRO-3, are those of `test_on_policy_distributed`.
NIGHTLY = ("ddp-accumulated", "zero1", "zero2-lora", "zero2-sequence", "zero3-sequence", "zero3-teacher")
# bfloat16 over float32 masters.
HALF_PRECISION = ("zero2", "zero3")
# Names and steps of the starts of two equal runs.
EIGHT_BITS = (("8bit", STEPS), ("8bit-resumed", PART), ("8bit-resumed", STEPS))


def config(folder: Path, name: str, kind: str, **changes: Any) -> dict[str, Any]:
    # At the other tests' rate of 1e-2 the losses of this network double a rounding error every step.
    run = settings(folder, name=name, steps=STEPS, optimizer__lr=1e-3, checkpoint__every=STEPS, **changes)
    run["student"]["init"] = str(folder / "network")
    run["student"]["time_frequency_limit"] = None
    run["objective"] = OBJECTIVES.get(kind, AVERAGE)
    if kind in ("lora", "teacher"):
        run["student"]["adapter"] = LORA
    if kind in OBJECTIVES:
        run["teacher"] = {"source": str(folder / "teacher")}
    return run


def in_8_bits(folder: Path, name: str) -> dict[str, Any]:
    """A network of which some weights are large enough."""
    run = settings(folder, name=name, optimizer__moments="8bit", checkpoint__every=STEPS)
    run["student"]["architecture"] |= {"attention_head_dim": 36}
    return run


def bf16(folder: Path, name: str, micro_batch: int) -> dict[str, Any]:
    return config(folder, name, "full", engine__precision="bf16", engine__micro_batch=micro_batch)


def frozen(folder: Path, name: str, micro_batch: int, **changes: Any) -> dict[str, Any]:
    """Adapters on a frozen base, and a frozen teacher; both are stored in bfloat16 unless changed."""
    changes |= {"student__gradient_checkpointing": "block", "engine__precision": "bf16"}
    return {**config(folder, name, "teacher", engine__micro_batch=micro_batch, **changes), "steps": PART}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and networks to start from."""
    folder = tmp_path_factory.mktemp("engines")
    write_latents(folder / "shards")
    write_networks(folder)
    return folder


@pytest.fixture(scope="module")
def first(folder: Path, request: pytest.FixtureRequest) -> Launch:
    """The launch of nearly all runs that two processes do."""
    names = {"offload": None} | dict.fromkeys(asked_for(request, "name", EQUAL))
    # The exact derivative comes first: DeepSpeed's ZeRO-3 replaces torch's linear function in the process, for good.
    wanted = {name: EQUAL[name] for name in sorted(names, key=lambda name: name != "ddp-jvp")}
    equal = [(engine, config(folder, name, kind, **changes)) for name, (engine, kind, changes) in wanted.items()]
    moved = ("zero2", {**config(folder, "moved", "full", engine__micro_batch=2), "steps": 1})
    whole = config(folder, "offload-resumed", "full", engine__micro_batch=2)
    resumed = [("zero3_offload", {**whole, "steps": PART}), ("zero3_offload", whole)]
    half = [(engine, {**bf16(folder, f"{engine}-bf16", 2), "steps": PART}) for engine in HALF_PRECISION]
    half += [(engine, frozen(folder, f"{engine}-frozen", 2)) for engine in HALF_PRECISION]
    eight = [("ddp", {**in_8_bits(folder, name), "steps": steps}) for name, steps in EIGHT_BITS]
    return together([*equal, moved, *resumed, *half, *eight], folder / "first")


@pytest.fixture(scope="module")
def runs(folder: Path, first: Launch, request: pytest.FixtureRequest) -> Path:
    """The runs of two processes, and the same by one."""
    for kind in dict.fromkeys(["full", *(EQUAL[name][1] for name in asked_for(request, "name", EQUAL))]):
        alone(config(folder, f"one-{kind}", kind))
    alone({**bf16(folder, "one-bf16", 4), "steps": PART})
    alone(frozen(folder, "one-frozen", 4, engine__frozen_precision="fp32"))
    alone({**config(folder, "moved", "full"), "steps": PART})
    together([("zero3", config(folder, "moved", "full", engine__micro_batch=4))], folder / "second")
    return folder


def alone(run: dict[str, Any]) -> None:
    """Train by this process, from the same words as the launches: files and models have defaults of their own."""
    assert training.run(compose("train", words(run))) == 0


def together(runs: list[tuple[str, dict[str, Any]]], place: Path) -> Launch:
    """Train each run by two processes under the engine that it names. Start-up is paid once for all."""
    place.mkdir()
    cases = [{"engine": engine, "config": run} for engine, run in runs]
    launch = Launch(fork, "zero2", cases, place, PYTHONPATH=f"{ROOT}{os.pathsep}{BITSANDBYTES}")
    assert launch.ended(LONGEST) == 0, launch.text()
    return launch


def logged(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", with_nightly(EQUAL, NIGHTLY))
def test_losses_are_those_of_one_process(runs: Path, name: str) -> None:
    ours, one = logged(runs / name), logged(runs / f"one-{EQUAL[name][1]}")
    assert len(ours) == len(one) == STEPS
    for row, wanted in zip(ours, one, strict=True):
        losses = [key for key in wanted if key.startswith("loss")]
        assert {key for key in row if key.startswith("loss")} == set(losses)  # so the branches hold samples alike
        for key in [*losses, "gradient_norm"]:
            # float32 sums in another order, over some steps of training; 1.3e-5 is the most seen of the mix, see below
            assert row[key] == pytest.approx(wanted[key], rel=3e-5 if name == "zero3-mixed" else 1e-5), key


@pytest.mark.parametrize("name", with_nightly([*EQUAL, "moved"], NIGHTLY))
def test_weights_averages_and_moments_are_those_of_one_process(runs: Path, name: str) -> None:
    kind = EQUAL[name][1] if name in EQUAL else "full"
    ours, one = final_tensors(runs / name), final_tensors(runs / f"one-{kind}")
    assert ours.keys() == one.keys()
    for key, tensor in ours.items():
        # Float32 sums in another order, magnified by Adam where the second moment is small; 1e-5 is the most seen. A
        # wrong factor or a lost micro-batch is an error of tenths. The mix divides differences of velocities, each of
        # them guided at a scale of 3, by 0.01: float32's 6e-8 become 6e-8 x (3 + 2) / 0.01 = 3e-5 of a gradient, and
        # twice that of its square. Seen: 8e-5 and 1e-4 in the moments, 1.5e-6 in weights and averages.
        moments_of_mix = name == "zero3-mixed" and key.startswith("exp_avg")
        assert (tensor - one[key]).norm() <= (3e-4 if moments_of_mix else 1e-4) * one[key].norm(), key


def test_a_run_moves_between_engines_and_worlds(runs: Path) -> None:
    """Two processes under ZeRO-2, then one, then two under ZeRO-3, other micro-batches each time."""
    ours, one = logged(runs / "moved"), logged(runs / "one-full")
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for step in (1, PART):  # the first step after each move
        assert ours[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-6)
    state = json.loads((list_checkpoints(runs / "moved" / "checkpoints")[-1] / "state.json").read_text())
    assert state["adam_steps"] == {"student": STEPS}


def test_every_process_saved_one_checkpoint_together(runs: Path) -> None:
    for name in (name for name in EQUAL if (runs / name).exists()):
        checkpoints = list_checkpoints(runs / name / "checkpoints")
        assert len(checkpoints) == 1
        for checkpoint in checkpoints:
            names = [set(load_file(file)) for file in sorted(checkpoint.glob("*-00001.safetensors"))]
            assert len(names) == 4
            assert all(found == names[0] for found in names)


@pytest.mark.parametrize("name", ["zero3", "offload"])
def test_shards_of_float32_weights_are_their_own_masters(first: Launch, name: str) -> None:
    assert [row["one_copy"] for row in first.results(name)] == [True, True]


def test_an_offloaded_run_resumes_bit_for_bit(runs: Path) -> None:
    """Masters, moments and averages come from the host's memory, and go back there."""
    assert logged(runs / "offload-resumed")[PART]["step"] == PART + 1
    assert_equal_runs(runs / "offload-resumed", runs / "offload")


def test_moments_in_8_bits_resume_bit_for_bit(runs: Path) -> None:
    """Codes and scales go from process 0 to both."""
    assert logged(runs / "8bit-resumed")[PART]["step"] == PART + 1
    assert_equal_runs(runs / "8bit-resumed", runs / "8bit")
    assert any(name.startswith("exp_avg_scale-") for name in final_tensors(runs / "8bit"))


@pytest.mark.parametrize("engine", HALF_PRECISION)
@pytest.mark.parametrize("kind", ["bf16", "frozen"])
def test_bf16_is_that_of_one_process(runs: Path, engine: str, kind: str) -> None:
    """Frozen weights that are stored in bfloat16 give the numbers of float32 ones."""
    ours, one = logged(runs / f"{engine}-{kind}"), logged(runs / f"one-{kind}")
    assert len(ours) == len(one) == PART
    for row, wanted in zip(ours, one, strict=True):
        for key in ("loss", "gradient_norm"):
            # Every micro-batch's gradient of a weight is rounded once, by at most 2^-9 of itself.
            assert row[key] == pytest.approx(wanted[key], rel=2**-8), key


@pytest.mark.parametrize("engine", HALF_PRECISION)
def test_bf16_is_in_the_products_and_nowhere_else(runs: Path, first: Launch, engine: str) -> None:
    """DeepSpeed's own bfloat16 would round all that is trained, and the time embedding too."""
    for row in first.results(f"{engine}-bf16"):
        embedder, block = (row["types"][name] for name in LAYERS)
        assert embedder == ["torch.float32"]
        assert block == ["torch.bfloat16", "torch.float32"]  # the forwards of the derivative are float32
    for group in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        kept = [t for name, t in final_tensors(runs / f"{engine}-bf16").items() if name.startswith(f"{group}-")]
        numbers = torch.cat([tensor.flatten() for tensor in kept])
        # one in 2^16 by chance, and zeros
        assert (numbers.bfloat16() == numbers).float().mean() < 0.05, group
