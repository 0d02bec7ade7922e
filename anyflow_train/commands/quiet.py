"""Hide progress bars and warnings of libraries that load models; the command line shows its own progress."""

from __future__ import annotations

import importlib
import sys
import warnings


def silence_loading_bars() -> None:
    """Hide "Loading weights" and "Loading pipeline components" of libraries that are already imported.

    Nothing is imported here, so that a command without models starts quickly. Bars of downloads stay visible.
    """
    # Diffusers 0.42 gives huggingface_hub 2 an argument that it ignores.
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")
    if "diffusers" in sys.modules:
        importlib.import_module("diffusers.utils.logging").disable_progress_bar()
    if "transformers" in sys.modules:
        hub = importlib.import_module("huggingface_hub.utils")
        shown = not hub.are_progress_bars_disabled()
        importlib.import_module("transformers.utils.logging").disable_progress_bar()
        if shown:  # transformers also hides the bars of huggingface_hub
            hub.enable_progress_bars()
