"""Where the files that travel with the package are: in an installed wheel, or in a checkout."""

from __future__ import annotations

from pathlib import Path

from anyflow_train.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]


def resource(name: str) -> Path:
    """The folder `configs` or `assets`: inside of the installed package, else beside it in a checkout.

    Raises:
        UserError: neither place has it (a damaged installation).
    """
    for parent in (PACKAGE, PACKAGE.parent):
        if (parent / name).is_dir():
            return parent / name
    raise UserError(name, f"folder not found in {PACKAGE} nor in {PACKAGE.parent}; install the package again")


def asset(name: str) -> str:
    """Absolute path of one shipped asset, as `${asset:tiny-wan}` in a config file gives it.

    The asset itself may be missing: the recipes that make it name its place before it exists.
    """
    return str(resource("assets") / name)
