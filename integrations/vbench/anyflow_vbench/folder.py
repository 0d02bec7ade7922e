"""Folder of one model at one number of calls: videos in VBench's layout, their settings, and their scores."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow_train.errors import UserError
from anyflow_train.files import TEMPORARY, take_lock, to_json, write_json
from anyflow_train.models.backbone import Backbone
from anyflow_vbench.config import Dimension
from anyflow_vbench.prompts import Prompt

MADE = "videos.json"
LOCK = ".lock"
DIGEST_VALUES = 1024
"""Values to read of each weight. Training changes all weights, and reading a large network in full takes long."""


@dataclass(frozen=True)
class Folder:
    """`videos/{prompt}-{index}.mp4`, `videos.json`, `prompts.json`, and `scores/<dimension>/`.

    Attributes:
        path: path of the folder.
        model: label of the model.
        calls: network calls per video.
        settings: settings that the videos depend on, except prompt and seed.
        prompts: prompts to make videos of.
        count: number of videos per prompt.
        seed: seed of all noise.
        closed: True if other videos are not allowed. With a user's own prompts VBench would score them too.
    """

    path: Path
    model: str
    calls: int
    settings: Mapping[str, Any]
    prompts: list[Prompt]
    count: int
    seed: int
    closed: bool

    @property
    def videos(self) -> Path:
        """Folder of the videos."""
        return self.path / "videos"

    def scores(self, dimension: Dimension) -> Path:
        """Return the folder of VBench's result for one dimension."""
        return self.path / "scores" / dimension

    def files(self, dimension: Dimension) -> set[str]:
        """List the file names of the videos that one dimension uses."""
        prompts = [prompt for prompt in self.prompts if dimension in prompt.dimensions]
        return {prompt.file(index) for prompt in prompts for index in range(self.count)}

    def missing(self) -> set[tuple[Prompt, int]]:
        """List prompt and index of the videos that do not exist yet."""
        there = {path.name for path in self.videos.iterdir()}
        wanted = ((prompt, index) for prompt in self.prompts for index in range(self.count))
        return {(prompt, index) for prompt, index in wanted if prompt.file(index) not in there}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder, record the settings of its videos, and remove incomplete files of a killed run.

        Raises:
            UserError: another process has the lock, or the folder has videos that were made with other settings.
        """
        self.videos.mkdir(parents=True, exist_ok=True)
        with open(self.path / LOCK, "a+") as lock:
            if not take_lock(fcntl.flock, lock.fileno(), fcntl.LOCK_EX, self.path):
                raise UserError(
                    "out", f"another `anyflow vbench` is writing to {self.path}; wait for it, or give another out"
                )
            for left_over in self.videos.glob(f"{TEMPORARY}*"):
                left_over.unlink()
            self._note()
            yield

    def _note(self) -> None:
        wanted = [(prompt, index) for prompt in self.prompts for index in range(self.count)]
        videos = {p.file(index): {"prompt": p.text, "seed": p.seed(self.seed, index)} for p, index in wanted}
        made = json.loads(to_json({"settings": self.settings, "videos": videos}))
        before = self._before()
        strangers = sorted(path.name for path in self.videos.iterdir() if path.name not in videos)
        if self.closed and strangers:
            problem = f"{self.videos} contains a different video, {strangers[0]}; give another out, or remove it"
            raise UserError("out", problem)
        for key, now in made["settings"].items():  # by name, so that weights come before their digest
            if before["settings"].get(key, now) != now:
                then = before["settings"][key]
                raise UserError(
                    "out", f"{self.path} contains videos with {key}={then!r}, not {now!r}; give another out"
                )
        for name, now in made["videos"].items():
            if before["videos"].get(name, now) != now:
                raise UserError("out", f"{self.path} contains {name} with another text or seed; give another out")
        write_json(self.path / MADE, {"settings": made["settings"], "videos": before["videos"] | made["videos"]})
        write_json(self.path / "prompts.json", {prompt.file(index): prompt.prompt for prompt, index in wanted})

    def _before(self) -> dict[str, dict[str, Any]]:
        path = self.path / MADE
        if not path.exists():
            return {"settings": {}, "videos": {}}
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
            return {"settings": dict(made["settings"]), "videos": dict(made["videos"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(str(path), f"cannot be read: {error}; give another out") from None


def digest(network: Backbone) -> str:
    """Hash a network's config and the first values of each weight, to identify what it computes."""
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    found = hashlib.sha256(to_json(config))
    for name, weight in sorted(network.named_parameters()):
        found.update(name.encode() + weight.detach().flatten()[:DIGEST_VALUES].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]
