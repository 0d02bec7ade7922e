"""How the suite is spread over workers, and a library that lies apart."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Their tests share launches of several processes, or runs of minutes, which every worker would make for itself. Or they
# are long, and not to be left for the end, when only one worker has any.
TOGETHER = (
    "models/test_sequence_parallel.py",
    "training/test_any_step.py",
    "training/test_causal_distributed.py",
    "training/test_engines_distributed.py",
    "training/test_faults.py",
    "training/test_hangs.py",
    "training/test_on_policy_distributed.py",
)


class _Spread(LoadScopeScheduling):
    """Test by test, but for the files that stay with one worker. Those come first."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return file if file.endswith(TOGETHER) else nodeid


def pytest_configure(config: pytest.Config) -> None:
    """Leave the nightly tests out, unless -m speaks of them."""
    chosen = config.option.markexpr
    if "nightly" not in chosen:
        config.option.markexpr = f"({chosen}) and not nightly" if chosen else "not nightly"


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


# Its own way, a mark for groups, does nothing under pytest 9.2 with xdist 3.8.
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Spread:
    """Called by xdist where there are several workers."""
    return _Spread(config, log)


BITSANDBYTES = Path(sys.prefix) / "bitsandbytes"
"""Where `launch/test.sh` puts it: peft imports it wherever it can, which takes every process a second."""


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library can be imported."""
    monkeypatch.syspath_prepend(BITSANDBYTES)
