"""What the tests of plans share."""

from __future__ import annotations

import pytest

from anyflow_train.plan import products


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter does not know the fused kernel of a CPU; the unfused one keeps the scores and repeats nothing."""
    monkeypatch.setattr(products, "ATTENTION_BACKWARD", 2.0)
