"""Shipped folders are found in an installed package and in a checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyflow_train.config import paths
from anyflow_train.errors import UserError


def test_an_installed_package_holds_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "anyflow_train"
    (package / "configs").mkdir(parents=True)
    (tmp_path / "site-packages" / "configs").mkdir()
    monkeypatch.setattr(paths, "PACKAGE", package)
    assert paths.resource("configs") == package / "configs"
    with pytest.raises(UserError, match="reinstall the package"):
        paths.resource("assets")


def test_a_checkout_has_them_beside_the_package() -> None:
    assert (paths.resource("configs") / "train.yaml").is_file()
    assert paths.asset("tiny-wan") == str(paths.resource("assets") / "tiny-wan")
