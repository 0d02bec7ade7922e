"""What users import from the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import anyflow_train
import anyflow_train.models
from tests.models.networks import TINY_WAN

OLD_RUN = Path(__file__).parent / "export" / "old_run"


@pytest.mark.parametrize("package", [anyflow_train, anyflow_train.models])
def test_every_name_is_there_and_says_what_it_is(package) -> None:
    for name in package._EXPORTS:
        found = getattr(package, name)
        assert name in dir(package)
        assert found.__name__ == name
        assert found.__doc__
    with pytest.raises(AttributeError, match="has no attribute 'load_studnet'"):
        _ = package.load_studnet


def test_importing_the_packages_imports_no_torch() -> None:
    program = (
        "import sys, anyflow_train, anyflow_train.models\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_module_hides_a_public_name() -> None:
    """`import anyflow_train.sample` would replace the function `anyflow_train.sample` by a module."""
    folder = Path(anyflow_train.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} | {path.name for path in folder.iterdir() if path.is_dir()}
    assert modules & set(anyflow_train._EXPORTS) == set()


def test_a_student_is_loaded_and_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(OLD_RUN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    from anyflow_train import Codec, Condition, load_student, sample

    student = load_student("trained/lora")
    codec = Codec.load(student.codec_source, "cpu")
    condition = Condition(torch.stack(codec.encode_text(["red ball"])))
    noise = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = sample(student.flow_map, noise, condition, calls=2, shift=student.sampling.shift)
    video = codec.decode_video(latents)

    assert latents.shape == noise.shape
    assert video.shape == (1, 3, 5, 32, 32)
    assert (student.name, student.step, student.chunks) == ("lora", 3, None)
    assert (student.sampling.frames, student.sampling.height, student.sampling.width) == (5, 32, 32)
    assert not student.network.training
    # The sampler of the command line is the same one.
    assert torch.equal(student.sampler(student.flow_map, noise, condition, 2, student.sampling.shift), latents)


def test_a_wan_transformer_is_a_teacher_or_the_start_of_a_student() -> None:
    teacher, student = anyflow_train.load_teacher(TINY_WAN), anyflow_train.load_student(TINY_WAN)
    assert (teacher.network.config["gate_value"], student.network.config["gate_value"]) == (0.0, 0.25)
    assert not teacher.sampling.any_step
    assert teacher.codec_source == str(TINY_WAN)
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 2, 16, 4, 4, generator=draw), torch.randn(1, 3, 64, generator=draw)
    condition = anyflow_train.Condition(text)
    now, then = torch.tensor([0.7]), torch.tensor([0.2])
    velocity = teacher.flow_map(x, now, then, condition)
    assert torch.equal(velocity, teacher.flow_map(x, now, now, condition))
    torch.testing.assert_close(velocity, student.flow_map(x, now, now, condition), rtol=1e-4, atol=1e-4)
    assert (velocity - student.flow_map(x, now, then, condition)).abs().max() > 1e-3
