"""Send a message to a web address when a run ends, fails or skips steps. It never disturbs the run."""

from __future__ import annotations

import json
import socket
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from anyflow_train.config.run import RunConfig

SECONDS = 10.0


class Notifier:
    """Posts JSON with `text` (Slack, Mattermost), `content` (Discord), `run`, `state`, `step` and `folder`.

    It is also a tracker, which reports the first step that was skipped because a number was not finite.

    Args:
        config: config of the run; without `notify` nothing is sent.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config, self._skipped = config, False

    def log(self, step: int, values: Mapping[str, float], videos: Mapping[str, Path] = MappingProxyType({})) -> None:
        """Report the first skipped step of this start."""
        if values.get("skipped", 0) > 0 and not self._skipped:
            self._skipped = True
            self.send("not finite", "skipped a step, because a loss or gradient was not finite", step)

    def close(self) -> None:
        """Do nothing: the end of a run is reported by whoever knows how it ended."""

    def send(self, state: str, text: str, step: int | None = None) -> None:
        """Post one message. An address that does not answer is a warning."""
        url, name = self._config.notify, self._config.name
        if url is None:
            return
        sentence = f"{name}: {text}" + ("" if step is None else f" (step {step}/{self._config.steps})")
        facts = {"run": name, "state": state, "step": step, "folder": str(Path(self._config.out) / name)}
        body = json.dumps({"text": sentence, "content": sentence, "host": socket.gethostname(), **facts}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            urllib.request.urlopen(request, timeout=SECONDS).close()
        except (OSError, ValueError) as error:
            print(f"warning: notify: the message was not delivered ({error})", file=sys.stderr)
