"""The command line shows its own progress, and not that of the libraries that load models."""

from __future__ import annotations

import importlib
import sys


def silence_loading_bars() -> None:
    """Take away "Loading weights" and "Loading pipeline components" where these libraries are imported already.

    What is not imported stays so: a command without models starts at once. Bars of downloads stay, as these take long.
    """
    if "diffusers" in sys.modules:
        importlib.import_module("diffusers.utils.logging").disable_progress_bar()
    if "transformers" in sys.modules:
        hub = importlib.import_module("huggingface_hub.utils")
        shown = not hub.are_progress_bars_disabled()
        importlib.import_module("transformers.utils.logging").disable_progress_bar()
        if shown:  # transformers also takes away the hub's
            hub.enable_progress_bars()
