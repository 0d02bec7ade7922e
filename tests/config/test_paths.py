"""Shipped folders are found in an installed package and in a checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyflow_train.config import paths
from anyflow_train.errors import ConfigWarning, UserError


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


def test_a_run_finds_its_codec_again(tmp_path: Path) -> None:
    assert paths.find_codec(str(tmp_path)) == str(tmp_path)
    assert paths.find_codec("lab/pipeline") == "lab/pipeline"
    with pytest.warns(ConfigWarning, match=r"/other/clone/assets/tiny-wan' does not exist any more; using"):
        assert paths.find_codec("/other/clone/assets/tiny-wan") == paths.asset("tiny-wan")
    with pytest.raises(UserError, match=r"^codec: is not set, and the run's '.*/moved' does not exist any more; name"):
        paths.find_codec(f"{tmp_path}/moved")
    with pytest.raises(UserError, match=r"^codec: is not set, and the run has no teacher\.source"):
        paths.find_codec(None)
