"""Content of a run's inputs: a run resumes on the same content under any path, and refuses other content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from anyflow_train.config.original import is_weights_file
from anyflow_train.config.run import RunConfig
from anyflow_train.data.fingerprint import component_fingerprint, file_fingerprint, known
from anyflow_train.data.index import index_name
from anyflow_train.data.shards import ShardSet
from anyflow_train.errors import UserError
from anyflow_train.training.checkpoints.reading import (
    DamagedCheckpoint,
    read_checksum,
    read_network,
    resolve_checkpoint,
)
from anyflow_train.training.checkpoints.run_directory import RunDirectory

INDICES = 32
"""Number of index files, with checksums of their samples, that tell data apart if the manifest does not."""
CHANGE = {
    "data.shards": "to start from this run on other data, set name=NEW student.init={run}; to resume, set it back",
    "student.init": "set it back or choose another name",
}
CHANGE |= dict.fromkeys(("teacher.source", "on_policy.fake_score.init"), CHANGE["student.init"])
CHANGE["evaluation.held_out"] = CHANGE["student.init"]


@dataclass(frozen=True)
class Inputs:
    """Facts about the content of a run's inputs, by config key. Inputs whose files cannot be read are missing.

    Attributes:
        begun: facts when the run began.
        now: facts of this start.
    """

    begun: Mapping[str, str] = field(default_factory=dict)
    now: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig, directory: RunDirectory) -> Inputs:
        """Read the facts of the run's first start, and those of its inputs now."""
        data, teacher, matching = config.data, config.teacher, config.on_policy.matching
        shards = {"data.shards": data.shards, "evaluation.held_out": config.evaluation.held_out}
        networks = {"student.init": config.student.init, "teacher.source": teacher.source}
        networks |= {"on_policy.fake_score.init": matching and matching.fake_score.init}
        read_shards = partial(shards_fact, cache=data.cache, cache_gib=data.cache_gib)
        facts = {key: known_fact(read_shards, path) for key, path in shards.items()}
        facts |= {key: known_fact(network_fact, path) for key, path in networks.items()}
        return cls(directory.read_inputs(), {key: fact for key, fact in facts.items() if fact is not None})

    def compared(self) -> dict[str, bool]:
        """Keys whose content is known now and then, and whether it is equal. Their paths do not matter."""
        return {key: self.begun[key] == self.now[key] for key in sorted(self.begun.keys() & self.now.keys())}

    def problem(self, key: str, before: object, now: object, run: str) -> str:
        """Describe other content: both paths, both facts, and what to do."""
        text = f"is {now!r}, {self.now[key]}, but the run began with {before!r}, {self.begun[key]}"
        return f"{text}; {CHANGE[key].format(run=run)}"


def network_fact(source: str) -> str | None:
    """Describe the weights of a run, checkpoint, folder or hub id. Returns None if the hub cannot be reached.

    Raises:
        UserError, DamagedCheckpoint, OSError, ValueError: it cannot be read.
    """
    path = Path(source).expanduser()
    if (path / "checkpoints").is_dir() or (path / "state.json").is_file():
        checkpoint = resolve_checkpoint(path)
        return f"{checkpoint.name} of run {read_network(checkpoint).run} ({read_checksum(checkpoint)[:12]})"
    if is_weights_file(path):
        return f"a network ({file_fingerprint(path)[:12]})"
    alone = path.is_dir() and not (path / "transformer").is_dir()
    where, part = (str(path.resolve().parent), path.resolve().name) if alone else (str(path), "transformer")
    found = known(component_fingerprint(where if path.is_dir() else source, part))
    return found and f"a network ({found[:12]})"


def shards_fact(location: str, cache: str | None, cache_gib: float) -> str:
    """Describe the samples of shards, from their manifest and index files.

    Raises:
        UserError, OSError, ValueError: they cannot be read.
    """
    shards = ShardSet.open(location, cache, cache_gib)
    content = shards.manifest.model_dump(mode="json")
    del content["codec"]["source"]  # a path; the fingerprints next to it identify the codec
    digest, names = hashlib.sha256(json.dumps(content, sort_keys=True).encode()), shards.manifest.shards
    # The manifest of an older version has no checksums of the indices.
    sampled = range(INDICES) if any(shard.index_sha256 is None for shard in names) else ()
    for number in sorted({position * len(names) // INDICES for position in sampled}):
        with suppress(OSError):
            index = json.loads(shards.folder.read_bytes(index_name(names[number].name)))
            # An index that the loader has built has no checksums. It is left out, because it may not exist yet.
            entries = index["entries"] if all(entry[3] is not None for entry in index["entries"]) else []
            digest.update(json.dumps(entries).encode())
    return f"{shards.manifest.samples} samples ({digest.hexdigest()[:12]})"


def known_fact(read: Callable[[str], str | None], source: str | None) -> str | None:
    """Read a fact; None if there is no source or it cannot be read, which whoever uses it reports."""
    with suppress(UserError, DamagedCheckpoint, OSError, ValueError, KeyError, TypeError):
        return None if source is None else read(source)
    return None
