"""Networks are loaded whatever the rest of the run's config says, and renamed keys are read under their new names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.__main__ import main
from anyflow_train.config.network import Lora
from anyflow_train.errors import UserError
from anyflow_train.files import file_sha256
from anyflow_train.training.checkpoints import config_file
from anyflow_train.training.checkpoints.config_file import decode_saved, saved_config
from anyflow_train.training.checkpoints.network_file import NetworkFile, Sampling
from anyflow_train.training.checkpoints.reading import (
    content_checksum,
    list_checkpoints,
    read_network,
    verify_checkpoint,
)
from anyflow_train.training.networks import load_trained_network
from anyflow_train.training.start_checks import check_start
from anyflow_train.training.weight_source import open_source
from tests.training.started import config, network, trained

LORA: dict[str, Any] = {"kind": "lora", "rank": 2, "alpha": 4.0, "full_modules": ["delta_embedder"]}
TEACHER = {"source": "somewhere", "codec": "codec"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return the checkpoint of a run with an adapter."""
    run = trained(tmp_path, "run", network(tmp_path), LORA, teacher=TEACHER, context={"i2v_probability": 0.0})
    return list_checkpoints(run / "checkpoints")[0]


def rewrite(checkpoint: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file of a checkpoint, and the checksums, as another version could have written it."""
    content = json.loads((checkpoint / name).read_text())
    change(content)
    (checkpoint / name).write_text(json.dumps(content))
    state = json.loads((checkpoint / "state.json").read_text())
    state.pop("checksum")
    state["files"][name] = file_sha256(checkpoint / name)
    (checkpoint / "state.json").write_text(json.dumps({**state, "checksum": content_checksum(state)}))


def without_network_file(checkpoint: Path) -> None:
    """Remove `network.json`, as in older checkpoints."""
    (checkpoint / "network.json").unlink()
    state = json.loads((checkpoint / "state.json").read_text())
    state.pop("checksum")
    state["files"].pop("network.json")
    (checkpoint / "state.json").write_text(json.dumps({**state, "checksum": content_checksum(state)}))


def of_another_version(content: dict[str, Any]) -> None:
    content["objective"] = {"kind": "somebodys.module:Objective", "strength": 2}
    content["colour"] = "red"
    content["student"]["adapter"]["initialisation"] = "olora"
    content["engine"] = 7


def test_it_says_what_the_run_s_config_says(checkpoint: Path, tmp_path: Path) -> None:
    read = read_network(checkpoint)
    shape = config(tmp_path, "run", "x", LORA).student.architecture.arguments()
    assert read.arguments == {**shape, "gate_value": 0.25, "deltatime_type": "r"}
    assert read.adapter == Lora(kind="lora", rank=2, alpha=4.0, full_modules=("delta_embedder",))
    assert (read.run, read.init, read.codec) == ("run", str(network(tmp_path)), "codec")
    assert read.sampling == Sampling(any_step=True, conditioning_frames=False, frames=5, height=32, width=32, shift=5.0)
    without_network_file(checkpoint)
    assert read_network(checkpoint) == read


@pytest.mark.parametrize("before_there_was_one", [False, True])
def test_a_network_is_loaded_whatever_the_rest_of_the_config_says(
    checkpoint: Path, tmp_path: Path, before_there_was_one: bool
) -> None:
    expected = load_trained_network(checkpoint).state_dict()
    if before_there_was_one:
        without_network_file(checkpoint)
    rewrite(checkpoint, "config.json", of_another_version)
    verify_checkpoint(checkpoint)
    found = load_trained_network(checkpoint).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    check_start(config(tmp_path, "new", checkpoint, LORA))


def test_what_a_later_version_adds_is_ignored_and_a_later_format_is_refused(checkpoint: Path) -> None:
    before = read_network(checkpoint)
    rewrite(checkpoint, "network.json", lambda content: content.update(licence="free"))
    assert read_network(checkpoint) == before
    rewrite(checkpoint, "network.json", lambda content: content.update(format=2))
    with pytest.raises(UserError, match=r"network\.json: has format 2; this version .* reads up to 1"):
        read_network(checkpoint)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("network.json", lambda content: content.pop("arguments"), "arguments does not describe a network"),
        ("network.json", lambda content: content["adapter"].update(rank="three"), "adapter.*does not describe"),
        ("config.json", lambda content: content.pop("student"), "lacks student.architecture"),
        ("config.json", lambda content: content.update(format=9), "has a config of format 9"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_and_exit_code_2(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, change: Any, message: str
) -> None:
    if name == "config.json":
        without_network_file(checkpoint)
    rewrite(checkpoint, name, change)
    assert main(["export", f"checkpoint={checkpoint}", f"out={tmp_path / 'out'}"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert str(checkpoint / name) in lines[0]
    with pytest.raises(UserError, match=message):
        read_network(checkpoint)


def test_renamed_keys_are_read_under_their_new_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = config(tmp_path, "run", "x", LORA)
    monkeypatch.setattr(config_file, "FORMAT", 3)
    renames = {2: {"optimizer.learning_rate": "optimizer.step_size"}, 3: {"optimizer.step_size": "optimizer.lr"}}
    monkeypatch.setattr(config_file, "RENAMES", {**renames, 3: {**renames[3], "network": "student"}})
    saved = saved_config(now)
    assert decode_saved(saved, "here") == now
    for written, key in ((None, "learning_rate"), (1, "learning_rate"), (2, "step_size")):
        old = json.loads(json.dumps({**saved, "format": written, "network": saved["student"]}))
        old.pop("student")
        if written is None:
            old.pop("format")
        old["optimizer"][key] = old["optimizer"].pop("lr")
        assert decode_saved(old, "here") == now
        assert NetworkFile.of_saved(config_file.under_new_names(old, "here"), "here").run == "run"


def test_the_numbers_of_calls_of_an_old_config_are_read(tmp_path: Path) -> None:
    now = config(tmp_path, "run", "x", LORA)
    old = json.loads(json.dumps({**saved_config(now), "format": 1}))
    old["evaluation"]["steps"] = [1, 3]
    del old["evaluation"]["calls"]
    assert decode_saved(old, "here").evaluation.calls == (1, 3)


def test_keys_of_another_version_are_named_in_one_sentence(tmp_path: Path) -> None:
    saved = saved_config(config(tmp_path, "run", "x", LORA))
    for change, message in (
        ({"colour": "red"}, "here: its config says colour, which this version cannot read"),
        ({"steps": "many"}, "here: its config says steps, which this version cannot read"),
        ({"objective": {"kind": "flow_map", "strength": 2}}, "here: its config says objective"),
        ({"format": 3}, "here: has a config of format 3; this version of anyflow_train reads up to 2"),
    ):
        with pytest.raises(UserError, match=message):
            decode_saved({**saved, **change}, "here")


def test_a_name_in_the_file_of_another_cannot_lead_out_of_a_folder(checkpoint: Path) -> None:
    rewrite(checkpoint, "network.json", lambda content: content.update(run="../../elsewhere"))
    with pytest.raises(UserError, match="run does not describe a network"):
        read_network(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "does not describe a network"),
        ({"num_layers": "x"}, "does not describe a network"),
        ({"num_layers": 10**12}, "num_layers = 1000000000000"),
    ],
)
def test_arguments_of_another_type_are_one_sentence(
    checkpoint: Path, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rewrite(checkpoint, "network.json", lambda content: content["arguments"].update(changes))
    with pytest.raises(UserError, match=message):
        open_source(checkpoint)
    rewrite_config = tmp_path / "network" / "config.json"
    rewrite_config.write_text(json.dumps({**json.loads(rewrite_config.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "network")
