"""Loading models shows no bar of the libraries; downloads still do."""

import subprocess
import sys

PROGRAM = """
import sys
from anyflow_train.__main__ import COMMANDS, _load
_load(COMMANDS["check"].target)
assert not {"torch", "transformers", "diffusers"} & set(sys.modules)
_load(COMMANDS["sample"].target)
import diffusers.utils.logging, huggingface_hub.utils, transformers.utils.logging
assert not diffusers.utils.logging.is_progress_bar_enabled()
assert not transformers.utils.logging.is_progress_bar_enabled()
assert not huggingface_hub.utils.are_progress_bars_disabled()
"""


def test_commands_silence_what_they_import_and_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
