"""`check` and `train` read what the run will open before torch: data, starts, teachers and disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anyflow_train.commands.preflight import check_files, trained_parameters
from anyflow_train.config.network import Lora
from anyflow_train.config.pipelines import WEIGHTS
from anyflow_train.config.run import RunConfig
from anyflow_train.models.adapters import add_lora, trainable_parameters
from anyflow_train.models.build import build_empty
from tests.models.networks import small_wan
from tests.training.helpers import settings, write_latents, write_networks
from tests.training.started import trained


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_latents(tmp_path / "shards")
    write_networks(tmp_path)
    return tmp_path


def config(folder: Path, **changes: Any) -> RunConfig:
    given = {"student__init": str(folder / "network"), "student__time_frequency_limit": None}
    return RunConfig.model_validate(settings(folder, **given | changes))


def errors(config: RunConfig) -> list[str]:
    return [str(error) for error in check_files(config).errors]


def test_files_that_fit_give_no_word(folder: Path) -> None:
    found = check_files(config(folder, teacher__source=str(folder / "teacher")))
    assert (found.errors, found.warnings) == ((), ())


def test_files_that_are_not_there_yet_are_warnings(tmp_path: Path) -> None:
    found = check_files(config(tmp_path, evaluation={"every": 5, "held_out": str(tmp_path / "held")}))
    assert found.errors == ()
    assert [warning.where for warning in found.warnings] == ["data.shards", "evaluation.held_out", "student.init"]


def test_the_manifest_is_compared_with_the_keys(folder: Path) -> None:
    assert errors(config(folder, data__frames=9))[0].startswith("data.frames: 9, but the shards of data.shards were")
    shard = next((folder / "shards").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    assert "bytes instead of" in errors(config(folder))[0]
    shard.unlink()
    assert f"{shard} is missing" in errors(config(folder))[0]
    (folder / "shards" / "manifest.json").write_text("{")
    assert str(folder / "shards" / "manifest.json") in errors(config(folder))[0]


def test_few_held_out_clips_are_said(folder: Path) -> None:
    write_latents(folder / "held_out", samples=4)
    evaluation = {"every": 5, "held_out": str(folder / "held_out"), "samples": 16}
    (warning,) = check_files(config(folder, evaluation=evaluation)).warnings
    assert "has 4 clips, but evaluation.samples=16" in str(warning)


def test_a_run_of_another_shape_is_no_start(folder: Path) -> None:
    run = trained(folder, "first", folder / "network", {"kind": "full"})
    assert errors(config(folder, student__init=str(run))) == []
    found = errors(config(folder, student__init=str(run), student__gate_value=0.5, times={"shift": 2.0}))
    assert [line.partition(":")[0] for line in found] == ["student.gate_value"]
    shutil.rmtree(run / "checkpoints" / "step_00000001")
    assert "contains no checkpoint" in errors(config(folder, student__init=str(run)))[0]


def test_a_network_of_another_shape_is_no_start_and_no_teacher(folder: Path) -> None:
    small_wan(in_channels=8, out_channels=8, text_dim=8).save_pretrained(folder / "other" / "transformer")
    taught = {"objective__velocity": "teacher", "teacher__source": str(folder / "other")}
    found = errors(config(folder, **taught))
    names = ("in_channels", "out_channels")
    assert found == [f"teacher.source: {folder}/other has {name}=8, but the student has 4" for name in names]
    found = errors(config(folder, student__init=str(folder / "other")))
    assert found[0].startswith("student.architecture.in_channels: is 4, but ")
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875, "transformer_2": ["diffusers", "Wan"]}
    (folder / "other" / "model_index.json").write_text(json.dumps(index))
    assert "has two transformers" in errors(config(folder, **taught))[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged or not a safetensors file ("),
        (lambda path: path.write_bytes(path.read_bytes() + b"0"), "is damaged or not a safetensors file ("),
        (lambda path: (path.unlink(), os.mkfifo(path)), "cannot be read (is not a regular file)"),
        (Path.unlink, "cannot be read (No such file or directory)"),
    ],
    ids=["pointer", "truncated", "longer", "fifo", "absent"],
)
def test_weights_that_are_not_whole_are_named(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder / "teacher" / WEIGHTS)
    (found,) = errors(config(folder, objective__velocity="teacher", teacher__source=str(folder / "teacher")))
    assert str(folder / "teacher" / WEIGHTS) in found
    assert message in found


@pytest.mark.parametrize("adapter", [{"kind": "full"}, {"kind": "lora", "rank": 3, "full_modules": ["delta_embedder"]}])
def test_the_number_of_trained_parameters_is_nearly_the_networks(folder: Path, adapter: dict[str, Any]) -> None:
    ours = config(folder, student__adapter=adapter, student__architecture__num_attention_heads=20)
    network = build_empty({**ours.student.architecture.arguments(), "gate_value": 0.25})
    if isinstance(ours.student.adapter, Lora):
        add_lora(network, ours.student.adapter, 0)
    exact = sum(parameter.numel() for parameter in trainable_parameters(network).values())
    assert trained_parameters(ours) == pytest.approx(exact, rel=0.03)  # biases, norms and the patch embedding


def test_a_full_disk_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 2**10}))
    for every, count in ((0, 3), (4, 5)):  # 8 steps
        (warning,) = check_files(config(folder, checkpoint__keep_every=every)).warnings
        assert f"{count} checkpoints of 0.2 MiB (checkpoint.keep and keep_every) need more" in str(warning)


def test_the_config_of_a_hub_id_is_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds the snapshot of a small pipeline; the tests run without a network."""
    small_wan(in_channels=8, out_channels=8, text_dim=8).save_pretrained(folder / "transformer")
    cache = folder / "cache" / "models--lab--small"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    (cache / "snapshots" / ("a" * 40) / "transformer").mkdir(parents=True)
    shutil.copy(folder / "transformer" / "config.json", cache / "snapshots" / ("a" * 40) / "transformer")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
    taught = {"objective__velocity": "teacher", "teacher__source": "lab/small"}
    assert errors(config(folder, **taught)) == [
        f"teacher.source: lab/small has {name}=8, but the student has 4" for name in ("in_channels", "out_channels")
    ]
    (warning,) = check_files(config(folder, **taught | {"teacher__source": "lab/other"})).warnings
    assert str(warning).startswith("teacher.source: 'lab/other' is not in the hub cache, ")


def test_an_output_that_cannot_be_written_is_an_error(folder: Path) -> None:
    (folder / "file").write_text("")
    (problem,) = errors(config(folder, out=str(folder / "file" / "runs")))
    assert problem.startswith(f"out: '{folder}/file/runs' cannot be written")


def test_a_folder_that_may_not_be_entered_is_named_with_its_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    assert errors(config(folder, student__init=None, student__time_frequency_limit=0.03)) == [
        f"data.shards: '{folder}/shards/manifest.json' cannot be read (Permission denied)"
    ]


def test_train_and_check_find_wrong_data_without_torch(folder: Path) -> None:
    for command in ("train", "check"):
        program = (
            "import sys\n"
            "from anyflow_train.__main__ import main\n"
            f"code = main(['{command}', 'experiment=tiny', 'data.shards={folder}/shards', 'out={folder}'])\n"
            "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)\n"
            "sys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "error: data.frames: 17, but the shards of data.shards were made with 5 frames" in done.stderr


def test_a_shard_that_the_run_will_not_open_is_named(folder: Path) -> None:
    shard = next((folder / "shards").glob("*.tar"))
    elsewhere = shard.rename(folder / shard.name)
    shard.symlink_to(elsewhere)
    assert f"{shard} cannot be read (leads out of its folder" in errors(config(folder))[0]
    shard.unlink()
    os.mkfifo(shard)
    assert f"{shard} cannot be read (is not a regular file)" in errors(config(folder))[0]
