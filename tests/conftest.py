"""How the suite is spread over workers, and a library that lies apart."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

# In this order: what takes longest must not be left for the end, when only one worker has any.
FIRST = (
    "training/test_any_step.py",
    "training/test_engines_distributed.py",
    "training/test_faults.py",
    "training/test_on_policy_distributed.py",
    "training/test_causal_distributed.py",
    "training/processes/test_hangs.py",
    "training/test_compiled.py",
    "data/prepare/test_workers.py",
    "training/test_host_synchronisation.py",
    "training/test_trainer.py",
    "commands/test_sweep.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests of the longest files to the front."""
    root = Path(__file__).parent
    places = {root / file: place for place, file in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(FIRST)))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """Give every file to one worker, which makes its fixtures once. xdist would begin with the files of most tests."""
    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Leave the nightly tests and those for the pretended GPU out, unless -m speaks of them."""
    for mark in ("nightly", "pretended_gpu"):
        chosen = config.option.markexpr
        if mark not in chosen:
            config.option.markexpr = f"({chosen}) and not {mark}" if chosen else f"not {mark}"


def with_nightly(names: Iterable[str], nightly: Iterable[str]) -> list[Any]:
    """Return parameters for a test: all names, of which some have the mark `nightly`."""
    return [pytest.param(name, marks=pytest.mark.nightly) if name in nightly else name for name in names]


def asked_for(request: pytest.FixtureRequest, parameter: str, names: Iterable[str]) -> list[str]:
    """Return those names with which this session's tests of the fixture's module are parametrized.

    A fixture that prepares a case for every name so leaves out the cases of tests that were not selected.
    """
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    of_module = [item.callspec.params for item in items if item.path == request.path and hasattr(item, "callspec")]
    found = {params.get(parameter) for params in of_module}
    return [name for name in names if name in found]


BITSANDBYTES = Path(sys.prefix) / "bitsandbytes"
"""Where `launch/test.sh` puts it: peft imports it wherever it can, which takes every process a second."""


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library can be imported."""
    monkeypatch.syspath_prepend(BITSANDBYTES)
