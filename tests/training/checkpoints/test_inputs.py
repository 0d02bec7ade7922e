"""A run knows its inputs by their content: moved ones resume, other ones are refused with both facts."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from anyflow_train.config.run import Data, RunConfig
from anyflow_train.data.manifest import State, parse_manifest, write_manifest
from anyflow_train.data.prepare.writing import write_shard
from anyflow_train.errors import UserError
from anyflow_train.training import run as training
from anyflow_train.training.checkpoints.inputs import Inputs, network_fact, shards_fact
from anyflow_train.training.checkpoints.run_directory import RunDirectory
from tests.data.helpers import make_sample, make_shards
from tests.shards import add_index_checksums
from tests.training.helpers import settings, write_latents, write_networks
from tests.training.started import trained


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A folder with data, two networks, and a run of one step on them."""
    write_latents(tmp_path / "shards")
    write_latents(tmp_path / "held_out", samples=4)
    write_networks(tmp_path)
    training.run(config(tmp_path, steps=1))
    return tmp_path


def config(folder: Path, inputs: Path | None = None, **changes: Any) -> RunConfig:
    """A run in `folder` with the inputs in another folder."""
    place = inputs or folder
    paths: dict[str, Any] = {
        "data__shards": str(place / "shards"),
        "evaluation__held_out": str(place / "held_out"),
        "student__init": str(place / "network"),
        "teacher__source": str(place / "teacher"),
        "student__time_frequency_limit": None,
    }
    return RunConfig.model_validate(settings(folder, **paths | changes))


def fact(folder: Path) -> str:
    return shards_fact(Data(shards=str(folder), frames=5, height=32, width=32), str(folder))


def grow(folder: Path) -> None:
    """Add a shard, and drop the first sample, as `anyflow prepare` does for a clip that has changed."""
    manifest = parse_manifest((folder / "manifest.json").read_bytes(), "")
    name = "shard-000009.tar"
    shutil.copyfile(folder / manifest.shards[0].name, folder / name)
    shards = (*manifest.shards, manifest.shards[0].model_copy(update={"name": name}))
    facts = {key: getattr(manifest, key) for key in State.model_fields.keys() - {"shards"}}
    before = State(shards=len(manifest.shards), **facts)
    now = before.model_copy(update={"shards": len(shards), "dropped": {manifest.shards[0].name: ((0, 1),)}})
    write_manifest(folder, manifest.grown([before, now], shards))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_resumes_on_the_samples_that_it_began_with(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(begun, begun / "undisturbed")
    training.run(config(begun / "undisturbed", steps=4, log_every=1))
    grow(begun / "shards")
    grow(begun / "held_out")
    capsys.readouterr()
    training.run(config(begun, steps=4, log_every=1))
    assert losses(begun) == losses(begun / "undisturbed")
    lines = [line for line in capsys.readouterr().out.splitlines() if "has grown" in line]
    assert len(lines) == 2
    assert re.search(r"data.shards has grown from 20 samples \(\w+\) to 39 samples", lines[0])
    assert lines[0].endswith(f"to start from this run on all of them, set name=NEW student.init={begun}/run")
    # Another run takes all of them, or the state that the config names.
    new = {"name": "new", "steps": 1, "student__init": str(begun / "run")}
    training.run(config(begun, **new))
    training.run(config(begun, **new | {"name": "old"}, data__generations={str(begun / "shards"): 0}))
    facts = [json.loads((begun / name / "inputs.json").read_text())["data.shards"][:2] for name in ("new", "old")]
    assert facts == ["39", "20"]


def problems(config: RunConfig) -> dict[str, str]:
    with pytest.raises(UserError) as refused:
        training.run(config)
    return {error.where: error.problem for error in refused.value.errors}


def test_moved_inputs_and_a_moved_run_resume(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("shards", "held_out", "network", "teacher"):
        shutil.move(begun / name, begun / "elsewhere" / name)
    (begun / "other").mkdir()
    shutil.move(begun / "run", begun / "other" / "run")
    monkeypatch.chdir(begun)
    assert training.run(config(begun / "other", Path("elsewhere"), steps=2)) == 0
    done = RunDirectory(begun / "other" / "run").read_done()
    assert done is not None
    assert done["step"] == 2


def test_other_data_is_refused_with_both_facts_and_the_way_on(begun: Path) -> None:
    write_latents(begun / "new", samples=12)
    found = problems(config(begun, steps=2, data__shards=str(begun / "new")))
    assert found.keys() == {"data.shards"}
    facts = r"12 samples \(\w{12}\), but the run began with '.*/shards', 20 samples \(\w{12}\)"
    assert re.search(facts, found["data.shards"])
    assert f"name=NEW student.init={begun}/run/checkpoints/step_00000001" in found["data.shards"]


def test_other_content_under_the_same_path_is_refused(begun: Path) -> None:
    write_latents(begun / "shards", poison=(3,))  # the same number of samples and of bytes
    path = begun / "teacher" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["proj_out.bias"] += 1
    save_file(weights, path, {"format": "pt"})
    assert problems(config(begun, steps=2)).keys() == {"data.shards", "teacher.source"}


def test_a_run_without_a_checkpoint_begins_again_on_other_data(begun: Path) -> None:
    shutil.rmtree(begun / "run" / "checkpoints")
    (begun / "run" / "done.json").unlink()
    write_latents(begun / "new", samples=12)
    assert training.run(config(begun, steps=1, data__shards=str(begun / "new"))) == 0
    assert training.run(config(begun, steps=2, data__shards=str(begun / "new"))) == 0


def test_a_run_of_an_older_version_is_compared_by_its_paths(begun: Path) -> None:
    (begun / "run" / "inputs.json").unlink()
    shutil.copytree(begun / "shards", begun / "copy")
    found = problems(config(begun, steps=2, data__shards=str(begun / "copy")))
    assert found == {
        "data.shards": f"is '{begun}/copy', but the run began with '{begun}/shards'; set it back or choose another name"
    }


def test_inputs_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    assert Inputs.of(config(tmp_path), RunDirectory(tmp_path / "run")) == Inputs()


def test_where_a_codec_lay_does_not_change_the_data(begun: Path) -> None:
    before = fact(begun / "shards")
    manifest = json.loads((begun / "shards" / "manifest.json").read_text())
    manifest["codec"]["source"] = "/another/clone/assets/tiny-wan"
    (begun / "shards" / "manifest.json").write_text(json.dumps(manifest))
    assert fact(begun / "shards") == before


def test_a_copied_run_is_the_same_start_and_another_step_is_not(begun: Path) -> None:
    run = trained(begun, "first", begun / "network", {"kind": "full"})
    shutil.copytree(run, begun / "copy")
    assert network_fact(str(run)) == network_fact(str(begun / "copy"))
    assert "step_00000001 of run first" in (network_fact(str(run)) or "")
    trained(begun, "first", begun / "network", {"kind": "full"}, step=2)
    assert network_fact(str(run)) != network_fact(str(begun / "copy"))
    # A run keeps the checkpoint that it began with, also when the first run moved and trained on.
    training.run(config(begun, name="second", student__init=str(begun / "copy"), steps=1))
    shutil.move(begun / "first", begun / "moved")
    assert training.run(config(begun, name="second", student__init=str(begun / "moved"), steps=2)) == 0


def test_every_shard_counts_for_the_content_of_data(tmp_path: Path) -> None:
    """Shard 4 of 40 is not among the indices that are read for a manifest without checksums of them."""
    facts = {}
    for place, changed in (("a", 4), ("b", 104)):
        folder = make_shards(tmp_path / place, [1] * 40)
        sample = dataclasses.replace(make_sample(4), key="clip-004", latents=make_sample(changed).latents)
        write_shard(folder, "shard-000004.tar", [sample])
        without = fact(folder)
        facts[place] = without, fact(add_index_checksums(folder))
    assert facts["a"][0] == facts["b"][0]
    assert facts["a"][1] != facts["b"][1]
