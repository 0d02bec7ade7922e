"""A run starts from another: its weights, its adapter, or a clear refusal."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyflow_train.config.network import Student
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.models.adapters import merge_lora, trainable_parameters
from anyflow_train.models.build import assemble
from anyflow_train.training import run as training
from anyflow_train.training.checkpoints.network_file import NetworkFile
from anyflow_train.training.checkpoints.reading import list_checkpoints, read_info
from anyflow_train.training.checkpoints.run_directory import RunDirectory
from anyflow_train.training.checkpoints.state import Best, TrainState
from anyflow_train.training.checkpoints.writing import save_checkpoint
from anyflow_train.training.networks import (
    load_trained_network,
    share_frozen,
    start_shared,
    start_student,
    start_teacher,
)
from anyflow_train.training.processes.world import ALONE
from anyflow_train.training.start_checks import check_start
from anyflow_train.training.weight_source import base_of, open_source, open_student_start, resolve_init_checkpoint
from tests.training.helpers import write_latents
from tests.training.started import config, network, trained

FULL: dict[str, Any] = {"kind": "full"}
LORA: dict[str, Any] = {"kind": "lora", "rank": 2, "alpha": 4.0, "full_modules": ["delta_embedder"]}
OTHER: dict[str, Any] = {"kind": "lora", "rank": 3, "alpha": 3.0, "targets": ["attn2.to_q"]}


def student(folder: Path, init: Path | str, adapter: dict[str, Any]) -> Student:
    return config(folder, "new", init, adapter).student


def asked_for(*arguments: Any) -> NetworkFile:
    return NetworkFile.of_student(student(*arguments))


def whole(run: Path) -> dict[str, Tensor]:
    """A run's merged weights."""
    return merge_lora(load_trained_network(run)).state_dict()


def build_base(settings: Student) -> nn.Module:
    """Base of a student's adapter."""
    source = open_student_start(settings)
    return assemble(source.arguments, source.read)


def assert_equal(one: nn.Module, weights: dict[str, Tensor]) -> None:
    found = merge_lora(one).state_dict()  # pyright: ignore
    assert found.keys() == weights.keys()
    assert [name for name in found if not torch.equal(found[name], weights[name])] == []


@pytest.mark.parametrize("first", [FULL, LORA])
@pytest.mark.parametrize("adapter", [FULL, LORA, OTHER])
def test_a_student_starts_as_what_a_run_trained(tmp_path: Path, first: dict, adapter: dict) -> None:
    run = trained(tmp_path, "first", network(tmp_path), first)
    for source in (run, list_checkpoints(run / "checkpoints")[0]):
        assert_equal(start_student(student(tmp_path, source, adapter), 0), whole(run))


def test_the_same_adapter_goes_on_being_trained_on_the_same_base(tmp_path: Path) -> None:
    run = trained(tmp_path, "first", network(tmp_path), LORA)
    again = trained(tmp_path, "second", run, LORA)
    for source in (run, again):
        ours = trainable_parameters(start_student(student(tmp_path, source, {**LORA, "targets": LORA_TARGETS}), 9))
        theirs = trainable_parameters(load_trained_network(source))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        base = build_base(student(tmp_path, source, LORA))
        assert base_of(asked_for(tmp_path, source, LORA)) == str(network(tmp_path))
        assert_equal(base, build_base(student(tmp_path, network(tmp_path), LORA)).state_dict())


LORA_TARGETS = list(
    reversed(["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2"])
)


def test_a_chain_of_runs(tmp_path: Path) -> None:
    """Full training, an adapter on it, another on both, and the same once more; each can be loaded."""
    chain = [network(tmp_path)]
    for name, adapter in (("full", FULL), ("lora", LORA), ("other", OTHER), ("again", OTHER)):
        before = chain[-1]
        chain.append(trained(tmp_path, name, before, adapter))
        if name != "full":
            below = before if name != "again" else chain[-3]
            assert_equal(build_base(student(tmp_path, before, adapter)), whole(below))
            assert Path(str(base_of(asked_for(tmp_path, before, adapter)))).is_relative_to(below)
    raw = merge_lora(load_trained_network(chain[-1], "raw"))
    assert_equal(raw, whole(chain[2]))  # the adapter's raw weights are zero


def test_other_roles_start_from_runs_too(tmp_path: Path) -> None:
    run = trained(tmp_path, "first", network(tmp_path), LORA)
    shape = student(tmp_path, run, LORA).architecture
    assert_equal(start_teacher(str(run), shape, ALONE), whole(run))


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    run = trained(tmp_path, "first", network(tmp_path), FULL)
    changes = {"student__gate_value": 0.5, "student__deltatime_type": "t-r"}
    wrong = config(tmp_path, "new", run, FULL, student__architecture__in_channels=8, **changes)
    with pytest.raises(UserErrors) as caught:
        check_start(wrong)
    keys = ["student.gate_value", "student.deltatime_type", "student.architecture.in_channels"]
    assert [error.where for error in caught.value.errors] == keys
    with pytest.raises(UserErrors, match=r"student\.gate_value: is 0\.5, but .* trained with 0\.25"):
        start_student(wrong.student, 0)
    check_start(config(tmp_path, "new", run, FULL, data__frames=9, data__width=64, times__shift=3.0))


def test_another_vae_is_refused(tmp_path: Path) -> None:
    def codec(name: str, scale: float) -> str:
        folder = tmp_path / name / "vae"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(f'{{"latents_std": [{scale}]}}')
        return str(folder.parent)

    ours, others = codec("ours", 1.0), codec("others", 2.0)
    run = trained(tmp_path, "first", network(tmp_path), FULL, teacher__codec=ours)
    check_start(config(tmp_path, "new", run, FULL, teacher__codec=ours))
    check_start(config(tmp_path, "new", run, FULL, teacher__codec=str(tmp_path / "gone")))
    with pytest.raises(UserErrors, match=r"teacher\.codec: has the VAE"):
        check_start(config(tmp_path, "new", run, FULL, teacher__codec=others))
    exported = Path(codec("exported", 1.0))
    with pytest.raises(UserErrors) as caught:
        check_start(config(tmp_path, "new", exported, FULL, teacher__codec=others))
    assert [error.where for error in caught.value.errors] == ["teacher.codec"]


def test_a_missing_base_and_a_circle_are_named(tmp_path: Path) -> None:
    run = trained(tmp_path, "first", network(tmp_path), LORA)
    second = trained(tmp_path, "second", run, OTHER)
    shutil.move(tmp_path / "network", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"^student\.init: .*{run}.* was trained on {tmp_path / 'network'}, which"):
        start_student(student(tmp_path, second, LORA), 0)
    shutil.move(tmp_path / "elsewhere", tmp_path / "network")
    shutil.rmtree(run)
    shutil.copytree(second, run)  # now `first` says that it began with `first`
    with pytest.raises(UserError, match=r"^student\.init: .*started from itself: .* <- "):
        start_student(student(tmp_path, run, LORA), 0)
    shutil.rmtree(run)
    with pytest.raises(UserError, match=r"^.*/second/.*: was trained on .*/first, which is missing"):
        load_trained_network(second)


def test_a_run_directory_is_pinned_to_the_checkpoint_that_it_began_with(tmp_path: Path) -> None:
    first = trained(tmp_path, "first", network(tmp_path), FULL, step=1)
    new = config(tmp_path, "new", first, LORA)
    directory = RunDirectory.of(new)
    checkpoint = first / "checkpoints" / "step_00000001"
    assert resolve_init_checkpoint(new, directory).student.init == str(checkpoint)
    directory.path.mkdir()
    directory.begin(resolve_init_checkpoint(new, directory))
    trained(tmp_path, "first", network(tmp_path), FULL, step=2)
    assert resolve_init_checkpoint(new, directory).student.init == str(checkpoint)
    assert resolve_init_checkpoint(new, RunDirectory(tmp_path / "another")).student.init == str(
        checkpoint.with_name("step_00000002")
    )
    both = new.model_copy(update={"teacher": new.teacher.model_copy(update={"source": str(first)})})
    assert resolve_init_checkpoint(both, directory).teacher.source == str(
        checkpoint
    )  # else two names would stand for one network
    plain = config(tmp_path, "new", network(tmp_path), LORA)
    assert resolve_init_checkpoint(plain, directory) is plain


def test_a_run_trains_on_from_another_and_is_resumed(tmp_path: Path) -> None:
    write_latents(tmp_path / "shards")
    first = trained(tmp_path, "first", network(tmp_path), LORA)
    new = config(tmp_path, "new", first, LORA, steps=1)
    training.run(new)
    trained(tmp_path, "first", network(tmp_path), LORA, step=2)
    assert training.run(new.model_copy(update={"steps": 2})) == 0
    (checkpoint,) = list_checkpoints(tmp_path / "new" / "checkpoints")[-1:]
    info = read_info(checkpoint)
    assert info.state.step == 2
    assert info.config["student"]["init"] == str(first / "checkpoints" / "step_00000001")
    ours, theirs = load_trained_network(checkpoint), load_trained_network(first / "checkpoints" / "step_00000001")
    for name, parameter in trainable_parameters(theirs).items():
        # two steps of at most lr = 1e-2 (warming up) from where the adapter was
        assert (trainable_parameters(ours)[name] - parameter).abs().max() < 0.02


def test_the_student_shares_its_base(tmp_path: Path) -> None:
    run = trained(tmp_path, "first", network(tmp_path), LORA)
    settings = student(tmp_path, run, LORA)
    shared = start_shared(settings, 0, ALONE)
    theirs = trainable_parameters(load_trained_network(run))
    ours = shared.parameters("student")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert share_frozen(shared, "teacher", str(network(tmp_path)), settings, "teacher.source") is None
    assert share_frozen(shared, "teacher", str(run), settings, "teacher.source") == "teacher"
    frozen = shared.parameters("teacher")
    assert all(torch.equal(frozen[name], theirs[name]) and not frozen[name].requires_grad for name in theirs)
    other = trained(tmp_path, "other", network(tmp_path), FULL)
    with pytest.raises(UserError, match=r"^teacher\.source: .*/other is neither .*/network"):
        share_frozen(shared, "third", str(other), settings, "teacher.source")
    changed = settings.model_copy(update={"deltatime_type": "t-r"})
    with pytest.raises(UserError, match=r"^student\.deltatime_type: is 't-r'"):
        share_frozen(shared, "third", str(run), changed, "teacher.source")
    with pytest.raises(UserError, match=r"^student\.adapter"):
        start_shared(student(tmp_path, run, FULL), 0, ALONE)


def test_the_best_checkpoint_is_the_start(tmp_path: Path) -> None:
    run = trained(tmp_path, "first", network(tmp_path), FULL, step=1)
    trained(tmp_path, "first", network(tmp_path), FULL, step=2)
    best = Best(1, "energy_distance_4", 0.5)
    (run / "checkpoints" / "best").write_text(f'{{"step": {best.step}}}')
    assert_equal(start_student(student(tmp_path, run, FULL), 0), whole(run / "checkpoints" / "step_00000001"))


@pytest.mark.parametrize("chain", [False, True])
def test_a_changed_bit_of_a_run_is_found_when_its_network_is_opened(tmp_path: Path, chain: bool) -> None:
    """Export, sample, evaluate, `student.init` and `teacher.source` all open runs in this way."""
    run = trained(tmp_path, "first", network(tmp_path), FULL)
    opened = trained(tmp_path, "second", run, LORA) if chain else run
    open_source(opened)
    (path,) = list_checkpoints(run / "checkpoints")[0].glob("ema-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-10] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"ema-00001\.safetensors: does not match its checksum"):
        open_source(opened)


def test_weights_of_a_run_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    config_ = config(tmp_path, "first", network(tmp_path), FULL)
    weights = {name: p.detach().clone() for name, p in trainable_parameters(start_student(config_.student, 0)).items()}
    weights["proj_out.bias"][0] = float("inf")
    groups = {"weights": weights.items(), "ema": weights.items()}
    save_checkpoint(tmp_path / "first" / "checkpoints", config_, TrainState(step=1), {"student": 1}, groups)
    with pytest.raises(UserError, match=r"the weight 'proj_out\.bias' contains NaN or inf"):
        load_trained_network(tmp_path / "first")


def test_a_file_that_the_checkpoint_does_not_list_is_not_read(tmp_path: Path) -> None:
    run = trained(tmp_path, "first", network(tmp_path), FULL)
    (path,) = list_checkpoints(run / "checkpoints")[0].glob("ema-*.safetensors")
    shutil.copy(path, path.with_name("ema-00002.safetensors"))
    with pytest.raises(UserError, match=r"ema-00002\.safetensors: is not listed in state\.json"):
        open_source(run)


def test_a_checkpoint_of_others_runs_no_command(tmp_path: Path) -> None:
    pipe = f"pipe:touch {tmp_path}/PWNED #"
    run = trained(tmp_path, "first", network(tmp_path), FULL, teacher__codec=None, data__shards=pipe)
    check_start(config(tmp_path, "new", run, FULL))
    assert not (tmp_path / "PWNED").exists()
