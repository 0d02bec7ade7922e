"""`anyflow doctor`: what it finds here, and each thing that can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.__main__ import main
from anyflow_train.commands import doctor


def lines(state: str) -> list[str]:
    return [line.text for line in doctor.findings() if line.state == state]


def test_this_machine_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert "attention kernels on" in printed
    assert printed.endswith("Training can run here.\n")
    assert {line.split()[0] for line in printed.split("\n\n")[0].splitlines()} <= {"ok", "note"}


def test_help_and_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--help"]) == 0
    assert "usage: anyflow doctor" in capsys.readouterr().out
    assert main(["doctor", "gpu=1"]) == 2


@pytest.mark.parametrize("found", ["0.1.0", None])
def test_an_untested_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, found: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    real: Callable[[str], str] = doctor.version

    def version(name: str) -> str:
        if name != "safetensors":
            return real(name)
        if found is None:
            raise doctor.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(doctor, "version", version)
    assert main(["doctor"]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrong")]
    assert len(wrong) == 1
    assert f"safetensors {found or 'is not installed'}" in wrong[0]
    assert "pip install 'safetensors" in wrong[0]


def test_attention_without_any_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("No available kernel")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fails)
    assert lines("wrong") == ["attention kernels on cpu: none works; not: flash, math"]


def test_a_full_disk_and_little_shared_memory_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_DISK", 1e9)
    monkeypatch.setattr(doctor, "LEAST_SHARED_MEMORY", 1e9)
    notes = "\n".join(lines("note"))
    assert "GiB free in this folder" in notes
    assert "/dev/shm has" in notes
    assert lines("wrong") == []


def test_a_hub_cache_on_a_disk_that_is_not_there_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "link" / "hub"))
    assert any(text.startswith("the hub cache") and "leads nowhere" in text for text in lines("note"))
