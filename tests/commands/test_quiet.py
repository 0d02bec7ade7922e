"""Loading models shows no bar of the libraries; downloads still do."""

import os
import subprocess
import sys
from pathlib import Path

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
sys.argv = ["anyflow", "sample", "no-such-model", "prompt=a", f"out={sys.argv[1]}"]
from anyflow_train.__main__ import script
script()
"""


def test_commands_silence_what_they_import_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: no-such-model: is no folder, and cannot be loaded from the hub"), done.stderr
    assert done.stderr.count("\n") == 1
