"""`anyflow demo MODEL`: serve the page. Only this machine can open it, and it loads nothing from a network."""

from __future__ import annotations

import importlib
import os
import tempfile
import threading
from typing import Any

from anyflow_train.commands.quiet import silence_loading_bars
from anyflow_train.config.commands import DemoConfig
from anyflow_train.errors import requires_extra
from anyflow_train.watch.server import serve


def run(config: DemoConfig) -> None:
    """Load the networks and serve the page until Ctrl-C. Uploaded files are deleted at the end.

    Raises:
        UserError: the extra `demo` is not installed, a network cannot be loaded, or the port is in use.
    """
    with tempfile.TemporaryDirectory(prefix="anyflow-demo-") as uploads:
        page = import_page(uploads)
        from anyflow_train.demo.play import load  # imports torch: not before it is known that the extra is there

        silence_loading_bars()
        stops: dict[str, threading.Event] = {}

        def stop_all() -> None:
            for stop in stops.values():
                stop.set()

        # The server waits for its threads: without `stop_all`, until the clip is made.
        serve(page.application(load(config), stops), config.port, stop_all)


def import_page(uploads: str) -> Any:
    """Import the page. gradio reads its environment variables when it is imported.

    Args:
        uploads: folder for uploaded files.

    Raises:
        UserError: the extra `demo` is not installed.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads, "HF_HUB_DISABLE_TELEMETRY": "1"}
    with requires_extra("demo", "demo"):
        return importlib.import_module("anyflow_train.demo.page")
