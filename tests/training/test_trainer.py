"""Whole runs of a tiny student: killed, stopped, poisoned, continued."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.config.run import RunConfig
from anyflow_train.data.shards import ShardSet
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.flow.types import FlowMap
from anyflow_train.models.adapters import trainable_parameters
from anyflow_train.training import run as training
from anyflow_train.training.checkpoints.config_file import decode_saved
from anyflow_train.training.checkpoints.reading import list_checkpoints, read_info, verify_checkpoint
from anyflow_train.training.networks import load_trained_network
from anyflow_train.training.validation import Validation
from tests.training.helpers import (
    assert_equal_runs,
    final_tensors,
    in_process,
    settings,
    train,
    train_and_die,
    train_with_log,
    write_latents,
    write_networks,
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_latents(folder / "shards")
    return train(settings(folder))


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_its_readers_need(undisturbed: Path) -> None:
    assert [path.name for path in list_checkpoints(undisturbed / "checkpoints")] == ["step_00000006", "step_00000008"]
    assert [row["step"] for row in logged(undisturbed)] == list(range(1, 9))
    row = logged(undisturbed)[0]
    assert {"loss", "loss_diffusion", "loss_consistency", "loss_free", "gradient_norm", "learning_rate"} <= row.keys()
    assert {"samples_per_second", "seconds_per_step", "memory_gib", "skipped"} <= row.keys()
    assert row["learning_rate"] == pytest.approx(1e-2 / 3)
    done = json.loads((undisturbed / "done.json").read_text())
    assert done["step"] == 8
    assert done["last_loss"] == pytest.approx(logged(undisturbed)[-1]["loss"])
    saved = json.loads((undisturbed / "config.json").read_text())
    assert decode_saved(saved, "config.json").name == undisturbed.name


# Random places, drawn anew at every run of the suite; the seed is part of the test's name.
# Parallel test workers must collect the same names: they share their run's id.
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(time.time_ns()))
SEED = int(os.environ.get("KILL_SEED", zlib.crc32(RUN.encode()) % 10_000))
DICE = random.Random(SEED)
# A step makes 2 backward passes; every 2nd one ends with a checkpoint of 6 files.
KILLS = [
    [("backward", DICE.randint(1, 10)), ("write", DICE.randint(1, 6)), ("step", DICE.randint(1, 3))],
    [("write", DICE.randint(7, 12)), ("backward", DICE.randint(1, 6)), ("write", DICE.randint(1, 6))],
]


@pytest.mark.parametrize("kills", KILLS, ids=lambda kills: f"seed{SEED}-" + "-".join(f"{p}{n}" for p, n in kills))
def test_killed_runs_end_bit_equal(undisturbed: Path, tmp_path: Path, kills: list[tuple[str, int]]) -> None:
    write_latents(tmp_path / "shards")
    config = settings(tmp_path, data__shards=str(tmp_path / "shards"))
    for place, count in kills:
        process = in_process(train_and_die, config, place, count)
        process.join(200)
        assert process.exitcode == -signal.SIGKILL
    run = train(config)
    assert_equal_runs(run, undisturbed)
    assert [row["step"] for row in logged(run)] == list(range(1, 9))
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_a_run_in_two_halves_equals_one(undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_latents(tmp_path / "shards")
    train(settings(tmp_path, steps=3))
    run = train(settings(tmp_path))
    assert "resuming from" in capsys.readouterr().out
    assert_equal_runs(run, undisturbed)
    train(settings(tmp_path))
    assert "is finished: 8 steps" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(
    undisturbed: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_latents(tmp_path / "shards")
    run = train(settings(tmp_path, steps=6))
    file = run / "checkpoints" / "step_00000006" / "exp_avg-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content if damage == "flipped" else content[:-1])
    assert_equal_runs(train(settings(tmp_path)), undisturbed)
    assert "exp_avg-00001.safetensors: does not match its checksum" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_exits_well(undisturbed: Path, tmp_path: Path, number: signal.Signals) -> None:
    write_latents(tmp_path / "shards")
    log = tmp_path / "log"
    # many steps, so that the signal comes before the end; the rest is then done with the undisturbed run's number
    process = in_process(train_with_log, settings(tmp_path, steps=1000, checkpoint__every=1000), log)
    while not (log.exists() and "step 1/" in log.read_text()):
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(200)
    assert process.exitcode == 0, log.read_text()
    assert number.name in log.read_text()
    assert "start again to resume" in log.read_text()
    stopped = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert len(stopped) == 1
    if read_info(stopped[0]).state.step < 8:
        assert_equal_runs(train(settings(tmp_path)), undisturbed)


def test_changed_keys_are_refused_by_name(undisturbed: Path) -> None:
    config = settings(undisturbed.parent, steps=20, seed=1, optimizer__lr=1.0)
    with pytest.raises(UserErrors) as caught:
        train(config)
    assert [error.where for error in caught.value.errors] == ["optimizer.lr", "seed"]


def test_a_poisoned_sample_is_skipped_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_latents(tmp_path / "shards", samples=40, poison=(7,))
    run = train(settings(tmp_path, steps=5))  # 40 samples: an epoch of 5 steps, one of them with the bad sample
    output = capsys.readouterr().out
    assert [line.split("samples: ")[1] for line in output.splitlines() if "not finite" in line] == ["clip-007; skipped"]
    info = read_info(list_checkpoints(run / "checkpoints")[-1])
    assert (info.state.skipped, info.state.step, info.state.data_position) == (1, 5, 40)
    assert info.adam_steps == {"student": 4}
    assert all(tensor.isfinite().all() for tensor in final_tensors(run).values())


def test_too_many_bad_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    write_latents(tmp_path / "shards", samples=8, poison=(2, 5))
    with pytest.raises(UserError, match=r"max_nonfinite_steps.*3 such steps in a row.*clip-002.*clip-005|clip-005"):
        train(settings(tmp_path))


def test_the_number_of_micro_batches_does_not_matter(undisturbed: Path, tmp_path: Path) -> None:
    write_latents(tmp_path / "shards")
    run = train(settings(tmp_path, engine__micro_batch=2))
    for row, other in zip(logged(run), logged(undisturbed), strict=True):
        # float32 sums in another order, over 8 steps of Adam; the norm also sees a scale, which Adam takes out
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert row["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-2)


def train_without_data(config: dict[str, Any], log: Path) -> None:
    """Train with a storage that never answers after 3 steps."""
    original, asked = ShardSet.read, 0

    def read(self: ShardSet, index: int) -> Any:
        nonlocal asked
        asked += 1
        return original(self, index) if asked <= 3 * 8 else threading.Event().wait()

    ShardSet.read = read  # type: ignore[method-assign]  # in a process of its own
    train_with_log(config, log)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_saves_and_ends_a_run_whose_data_never_come(tmp_path: Path, workers: int) -> None:
    write_latents(tmp_path / "shards")
    config, log = settings(tmp_path, data__workers=workers, checkpoint__every=100), tmp_path / "log"
    process = in_process(train_without_data, config, log)
    deadline = time.monotonic() + 100
    while not (log.exists() and "step 3/8" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(100)
    assert process.exitcode == 0, log.read_text()
    assert "stopped after step 3 of 8" in log.read_text()
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000003"]


def test_a_single_process_reports_that_its_data_never_come(tmp_path: Path) -> None:
    write_latents(tmp_path / "shards")
    log = tmp_path / "log"
    process = in_process(train_without_data, settings(tmp_path, engine__timeout_seconds=4), log)
    process.join(200)
    assert process.exitcode == 1, log.read_text()
    assert "error: no progress for" in log.read_text()
    assert "last report: step 4, loading data" in log.read_text()
    assert "Stack traces of process 0" in (tmp_path / "run" / "logs" / "process_00000.txt").read_text()


class Judge:
    """Pretends that the student was best after 4 steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, student: FlowMap, folder: Path, interrupted: Any, show: Any) -> Validation | None:
        step = int(folder.name.removeprefix("step_"))
        self.steps.append(step)
        return Validation({"energy_distance_4": abs(step - 4.0)})


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    write_latents(tmp_path / "shards")
    judge = Judge()
    config = RunConfig.model_validate(settings(tmp_path, evaluation__every=2, checkpoint__every=3, checkpoint__keep=1))
    training.run(config, lambda *_: judge)
    assert judge.steps == [2, 4, 6, 8]
    run = tmp_path / "run"
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step_00000004", "step_00000008"]
    assert json.loads((run / "checkpoints" / "best").read_text())["step"] == 4
    assert json.loads((run / "done.json").read_text())["metrics"] == {"energy_distance_4": 4.0}


def test_a_validation_that_fails_costs_no_step_and_is_done_again(tmp_path: Path) -> None:
    write_latents(tmp_path / "shards")
    config = RunConfig.model_validate(settings(tmp_path, evaluation__every=4, checkpoint__every=4, checkpoint__keep=1))

    def fail(student: FlowMap, folder: Path, interrupted: Any, show: Any) -> Validation | None:
        raise RuntimeError("the validation is broken")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="the validation is broken"):
            training.run(config, lambda *_: fail)
        (point,) = list_checkpoints(tmp_path / "run" / "checkpoints")
        assert (read_info(point).state.step, read_info(point).state.validated) == (4, 0)
    judge = Judge()
    training.run(config, lambda *_: judge)
    assert judge.steps == [4, 8]
    best, last = list_checkpoints(tmp_path / "run" / "checkpoints")
    # both were saved before they were validated
    for point, distance in ((best, 0.0), (last, 4.0)):
        state = verify_checkpoint(point).state
        assert (state.validated, state.metrics) == (state.step, {"energy_distance_4": distance})
        assert state.best is not None
        assert state.best.step == 4
    assert json.loads((best.parent / "best").read_text())["step"] == 4


@pytest.mark.parametrize("objective", ["flow_matching", "flow_map"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_trained_network_comes_back_from_its_checkpoint(tmp_path: Path, objective: str, adapter: str) -> None:
    write_latents(tmp_path / "shards")
    changes: dict[str, Any] = {"objective": {"kind": objective}}
    if adapter == "lora":
        lora = {"kind": "lora", "rank": 2, "alpha": 2.0, "full_modules": ["condition_embedder.time_embedder"]}
        write_networks(tmp_path)
        start = {"student__init": str(tmp_path / "network"), "student__time_frequency_limit": None}
        changes |= {"student__adapter": lora, **start}
    run = train(settings(tmp_path, steps=4, **changes))
    tensors = final_tensors(run)
    for weights, group in (("raw", "weights"), ("ema", "ema")):
        network = load_trained_network(run, weights)
        state = trainable_parameters(network)
        trained = {name.split(": ")[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{group}-")}
        assert trained
        assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())
    different = [
        name for name in trained if not torch.equal(trained[name], tensors[f"weights-00001.safetensors: {name}"])
    ]
    assert different


def test_the_ema_derivative_network_is_the_average(undisturbed: Path, tmp_path: Path) -> None:
    write_latents(tmp_path / "shards")
    run = train(settings(tmp_path, objective__derivative_network="ema", steps=6))
    # Rebalanced, the whole loss hardly depends on the target.
    losses, others = ([row["loss_free"] for row in logged(path)] for path in (run, undisturbed))
    # The average is a copy until after step 4, and lags behind the student from then on.
    assert losses[:4] == others[:4]
    assert all(loss != other for loss, other in zip(losses[4:], others[4:6], strict=True))
    assert logged(run)[-1]["skipped"] == 0


def test_a_bf16_run_sees_float32_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyflow_train.models.embeddings import ConditionEmbedder

    seen: list[torch.dtype] = []
    original = ConditionEmbedder.forward

    def spy(self: ConditionEmbedder, *arguments: Any) -> Any:
        seen.extend(a.dtype for a in arguments[:2])
        return original(self, *arguments)

    monkeypatch.setattr(ConditionEmbedder, "forward", spy)
    write_latents(tmp_path / "shards")
    train(settings(tmp_path, steps=1, engine__precision="bf16", objective__derivative_precision="bf16"))
    assert seen
    assert set(seen) == {torch.float32}


def train_launched(environment: dict[str, str], config: dict[str, Any]) -> None:
    """Train with the variables of a launcher."""
    os.environ.update(environment)
    train(config)


def test_accelerate_launch_runs_it_unchanged(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher runs in this process, and what it starts is forked, so nothing is imported anew."""
    from accelerate.commands import launch

    write_latents(tmp_path / "shards")

    class Started:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            assert command == [sys.executable, "program.py"]
            self.process = in_process(train_launched, env, settings(tmp_path))

        def wait(self) -> None:
            self.process.join(200)

        @property
        def returncode(self) -> int | None:
            return self.process.exitcode

    monkeypatch.setattr(launch.subprocess, "Popen", Started)
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    arguments = ["--cpu", "--num_processes", "1", *options, "program.py"]
    launch.launch_command(launch.launch_command_parser().parse_args(arguments))
    assert_equal_runs(tmp_path / "run", undisturbed)
