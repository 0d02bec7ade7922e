"""Content of a run's inputs: a run resumes on the same content under any path, and refuses other content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from anyflow_train.config.original import is_weights_file
from anyflow_train.config.run import Data, RunConfig
from anyflow_train.data.fingerprint import component_fingerprint, file_fingerprint, known
from anyflow_train.data.index import index_name
from anyflow_train.data.shards import open_shards
from anyflow_train.files import parse_json
from anyflow_train.training.checkpoints.reading import read_checksum, read_network, resolve_checkpoint
from anyflow_train.training.checkpoints.run_directory import RunDirectory
from anyflow_train.training.checkpoints.state import is_run

AND = " + "
"""Between the facts of several shards."""
INDICES = 32
"""Number of index files, with checksums of their samples, that tell data apart if the manifest does not."""
SET_BACK = "set it back or choose another name"
NEW_RUN = "to start from this run on {data}, set name=NEW student.init={run}"
"""Advice to a user whose run would resume with other values, and to one with other training data."""


@dataclass(frozen=True)
class Inputs:
    """Facts about the content of a run's inputs, by config key. Inputs whose files cannot be read are missing.

    Attributes:
        begun: facts when the run began.
        now: facts of this start.
        earlier: for shards that have grown since the run began, the states that it began with, by location.
    """

    begun: Mapping[str, str] = field(default_factory=dict)
    now: Mapping[str, str] = field(default_factory=dict)
    earlier: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig, directory: RunDirectory) -> Inputs:
        """Read the facts of the run's first start, and those of its inputs now."""
        data, teacher, matching = config.data, config.teacher, config.on_policy.matching
        shards = {"data.shards": data.locations}
        shards |= {"evaluation.held_out": (config.evaluation.held_out,)} if config.evaluation.held_out else {}
        networks = {"student.init": config.student.init, "teacher.source": teacher.source}
        networks |= {"on_policy.fake_score.init": matching and matching.fake_score.init}
        facts = {key: known_fact(partial(shards_facts, data, places)) for key, places in shards.items()}
        facts |= {key: known_fact(partial(network_fact, path)) for key, path in networks.items() if path}
        begun, now = directory.read_inputs(), {key: fact for key, fact in facts.items() if fact is not None}
        others = [key for key in shards if key in begun and key in now and begun[key] != now[key]]
        earlier = {key: find_states(data, shards[key], begun[key]) for key in others}
        return cls(begun, now, {key: states for key, states in earlier.items() if states})

    def compared(self) -> dict[str, bool]:
        """Keys whose content is known now and then, and whether it is equal. Their paths do not matter."""
        same = {key: self.begun[key] == self.now[key] for key in sorted(self.begun.keys() & self.now.keys())}
        return {**same, **dict.fromkeys(self.earlier, True)}

    def resumed(self, config: RunConfig) -> RunConfig:
        """Return the config of a run that resumes: shards that have grown are used as they were when it began."""
        states = {location: state for found in self.earlier.values() for location, state in found.items()}
        data = config.data.model_copy(update={"generations": {**config.data.generations, **states}})
        return config.model_copy(update={"data": data})

    def grown(self, run: str) -> list[str]:
        """Describe the shards that have grown since the run began, and how to train on all of them."""
        advice = NEW_RUN.format(data="all of them", run=run)
        return [
            f"{key} has grown from {self.begun[key]} to {self.now[key]}; this run continues on those that it began with"
            + (f"; {advice}" if key == "data.shards" else "")
            for key in self.earlier
        ]

    def problem(self, key: str, before: object, now: object, run: str) -> str:
        """Describe other content: both paths, both facts, and what to do."""
        text = f"is {now!r}, {self.now[key]}, but the run began with {before!r}, {self.begun[key]}"
        elsewhere = f"{NEW_RUN.format(data='other data', run=run)}; to resume, set it back"
        return f"{text}; {elsewhere if key == 'data.shards' else SET_BACK}"


def network_fact(source: str) -> str | None:
    """Describe the weights of a run, checkpoint, folder or hub id. Returns None if the hub cannot be reached.

    Raises:
        UserError, OSError, ValueError: it cannot be read.
    """
    path = Path(source).expanduser()
    if is_run(path):
        checkpoint = resolve_checkpoint(path)
        return f"{checkpoint.name} of run {read_network(checkpoint).run} ({read_checksum(checkpoint)[:12]})"
    if is_weights_file(path):
        return f"a network ({file_fingerprint(path)[:12]})"
    alone = path.is_dir() and not (path / "transformer").is_dir()
    where, part = (str(path.resolve().parent), path.resolve().name) if alone else (str(path), "transformer")
    found = known(component_fingerprint(where if path.is_dir() else source, part))
    return found and f"a network ({found[:12]})"


def find_states(data: Data, locations: Sequence[str], facts: str) -> dict[str, int]:
    """Find the states of grown shards that facts describe. Returns nothing if there is none for a location."""
    states: dict[str, int] = {}
    described = facts.split(AND)
    if len(locations) != len(described):
        return states
    for location, fact in zip(locations, described, strict=True):
        if shards_fact(data, location) != fact:
            known = range(0) if location in data.generations else range(open_shards(data, location).generations - 1)
            trial = ((state, data.model_copy(update={"generations": {location: state}})) for state in reversed(known))
            found = next((state for state, one in trial if shards_fact(one, location) == fact), None)
            if found is None:
                return {}
            states[location] = found
    return states


def shards_facts(data: Data, locations: Sequence[str]) -> str:
    """Describe the samples of several shards, each as `shards_fact` does. Raises UserError, OSError or ValueError."""
    return AND.join(shards_fact(data, location) for location in locations)


def shards_fact(data: Data, location: str) -> str:
    """Describe the samples of shards, from their manifest and index files, in the state that the config says.

    Raises:
        UserError, OSError, ValueError: they cannot be read.
    """
    shards = open_shards(data, location)
    # What a manifest lacks that has not grown is left out, so that the fact is that of earlier versions.
    content = shards.manifest.model_dump(mode="json", exclude=shards.manifest.unused)
    del content["codec"]["source"]  # a path; the fingerprints next to it identify the codec
    digest, names = hashlib.sha256(json.dumps(content, sort_keys=True).encode()), shards.manifest.shards
    # The manifest of an older version has no checksums of the indices.
    sampled = range(INDICES) if any(shard.index_sha256 is None for shard in names) else ()
    for number in sorted({position * len(names) // INDICES for position in sampled}):
        with suppress(OSError):
            index = parse_json(shards.folder.read_bytes(index_name(names[number].name)))
            # An index that the loader has built has no checksums. It is left out, because it may not exist yet.
            entries = index["entries"] if all(entry[3] is not None for entry in index["entries"]) else []
            digest.update(json.dumps(entries).encode())
    return f"{shards.manifest.samples} samples ({digest.hexdigest()[:12]})"


def known_fact(read: Callable[[], str | None]) -> str | None:
    """Read a fact; None if it cannot be read, which whoever uses the source reports."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return read()
    return None
