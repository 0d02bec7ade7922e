"""Paths of the files that are shipped with the package, in an installed wheel or in a checkout."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from anyflow_train.errors import ConfigWarning, UserError

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


def find_codec(saved: str | None) -> str:
    """Return the pipeline folder or hub id that a run's network file names as its codec.

    An asset of another installation is looked for among the assets of this one, with a warning.

    Raises:
        UserError: the run has no codec, or its folder does not exist any more.
    """
    advice = "name the pipeline folder of its VAE and text encoder"
    if saved is None:
        raise UserError("codec", f"is not set, and the run has no teacher.source or teacher.codec; {advice}")
    path = Path(saved).expanduser()
    if os.path.exists(path) or not path.is_absolute():
        return saved
    here = resource("assets") / path.name
    if path.parent.name != "assets" or not here.is_dir():
        raise UserError("codec", f"is not set, and the run's '{saved}' does not exist any more; {advice}")
    warnings.warn(f"codec: '{saved}' does not exist any more; using '{here}'", ConfigWarning, stacklevel=2)
    return str(here)


def asset(name: str) -> str:
    """Return the absolute path of a shipped asset; config files write `${asset:tiny-wan}`.

    The asset need not exist: the experiments that build it use its path first.
    """
    return str(resource("assets") / name)
