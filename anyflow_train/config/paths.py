"""Paths of the files that are shipped with the package, in an installed wheel or in a checkout."""

from __future__ import annotations

from pathlib import Path

from anyflow_train.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]


def resource(name: str) -> Path:
    """Find the folder `configs` or `assets`: inside the installed package, or next to it in a checkout.

    Raises:
        UserError: the folder does not exist (a damaged installation).
    """
    for parent in (PACKAGE, PACKAGE.parent):
        if (parent / name).is_dir():
            return parent / name
    raise UserError(name, f"folder not found in {PACKAGE} nor in {PACKAGE.parent}; reinstall the package")


def asset(name: str) -> str:
    """Return the absolute path of a shipped asset; config files write `${asset:tiny-wan}`.

    The asset need not exist: the experiments that build it use its path first.
    """
    return str(resource("assets") / name)
