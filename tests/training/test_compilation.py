"""A run is compiled only where torch can compile."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import ConfigWarning
from anyflow_train.training.attention import attention_by
from anyflow_train.training.compilation import with_working_compiler
from anyflow_train.training.processes.world import ALONE
from tests.training.helpers import settings


def config(compiled: bool) -> RunConfig:
    return RunConfig.model_validate(settings(Path("nowhere"), engine__compile=compiled))


def test_a_broken_compiler_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("no C compiler\nmore lines")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    with pytest.warns(ConfigWarning, match=r"does not work here \(BackendCompilerFailed: .*\); the run continues"):
        assert not with_working_compiler(config(True), ALONE).engine.compile


def test_a_working_one_is(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    assert with_working_compiler(config(True), ALONE).engine.compile
    assert not recwarn.list


def test_a_run_that_is_not_compiled_does_not_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", None)
    given = config(False)
    assert with_working_compiler(given, ALONE) is given


def test_compiled_graphs_are_kept_apart_by_the_kernel_of_attention() -> None:
    """torch's cache on the disk does not see which kernel is chosen."""
    compiler: Any = torch.compiler.config
    tags = []
    for name in ("sdpa", "flash"):
        with attention_by(name):
            tags.append(compiler.cache_key_tag)
    assert tags[0] != tags[1]
    assert compiler.cache_key_tag not in tags
