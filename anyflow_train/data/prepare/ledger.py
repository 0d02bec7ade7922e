"""The ledger of a folder of shards: which clips went into which shard, in the order in which the folder grew.

When `anyflow prepare` finds something to encode, it first writes a list of it, a generation. A job that was killed
continues the last generation, so that the result does not depend on when it was killed.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from anyflow_train.data.index import ShardIndex, Skipped, index_name, parse_index
from anyflow_train.data.manifest import TEXT, State
from anyflow_train.data.prepare.captions import CaptionError
from anyflow_train.data.prepare.sources import Clip
from anyflow_train.data.prepare.windows import clip_of
from anyflow_train.errors import UserError
from anyflow_train.files import atomic_file, parse_json

PATTERN = "generation-*.jsonl"


class ClipRecord(NamedTuple):
    """Clip as it was when it was planned.

    Attributes:
        key: its key in the source.
        size: bytes of the video; None if there is no such file.
        time: time of the video's last change in ns; None if there is no such file.
        caption: digest of its captions; empty if they cannot be read.
    """

    key: str
    size: int | None
    time: int | None
    caption: str


@dataclass(frozen=True)
class ShardRecord:
    """Planned shard.

    Attributes:
        name: name of its tar.
        clips: clips that become its samples.
        origin: shard whose samples of these clips are copied; None if the clips are encoded.
    """

    name: str
    clips: tuple[ClipRecord, ...]
    origin: str | None = None


@dataclass(frozen=True)
class FolderPrompts:
    """Prompts of the manifest.

    Attributes:
        negative: the negative prompt.
        validation: prompts of validation.
        text: name of the file with their embeddings.
    """

    negative: str
    validation: tuple[str, ...]
    text: str = TEXT


@dataclass(frozen=True)
class Generation:
    """Shards and prompts that one call of `anyflow prepare` adds.

    Attributes:
        number: number of the generation, from 0.
        prompts: prompts from this generation on.
        shards: shards to write.
        problems: clips that could not be listed.
        gone: keys of earlier clips that the source does not have any more.
        removed: earlier shards whose samples that stay are copied into shards of this generation.
        only_retries: whether all its clips were skipped before and have not changed since.
    """

    number: int
    prompts: FolderPrompts
    shards: tuple[ShardRecord, ...] = ()
    problems: tuple[Skipped, ...] = ()
    gone: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    only_retries: bool = False

    @property
    def name(self) -> str:
        """Name of the generation's file."""
        return f"generation-{self.number:06d}.jsonl"

    def write(self, folder: Path) -> None:
        """Write the file atomically: a line of facts, and a line for each shard."""
        facts = {"prompts": astuple(self.prompts), "problems": [astuple(problem) for problem in self.problems]}
        facts |= {"gone": self.gone, "removed": self.removed, "only_retries": self.only_retries}
        lines = [facts, *({"shard": one.name, "origin": one.origin, "clips": one.clips} for one in self.shards)]
        with atomic_file(folder / self.name) as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())

    @classmethod
    def read(cls, path: Path) -> Generation:
        """Read a file that `write` wrote. Raises UserError if it is damaged."""
        try:
            facts, *shards = (parse_json(line) for line in path.read_text("utf-8").splitlines())
            negative, validation, text = facts["prompts"]
            return cls(
                int(path.stem.rpartition("-")[2]),
                FolderPrompts(negative, tuple(validation), text),
                tuple(
                    ShardRecord(one["shard"], tuple(ClipRecord(*clip) for clip in one["clips"]), one["origin"])
                    for one in shards
                ),
                tuple(Skipped(*problem) for problem in facts["problems"]),
                tuple(facts["gone"]),
                tuple(facts["removed"]),
                facts["only_retries"],
            )
        except (ValueError, KeyError, TypeError) as error:
            problem = (
                f"is not a list of clips that `anyflow prepare` wrote ({error}); copy it again, or name another out"
            )
            raise UserError(str(path), problem) from None


@dataclass(frozen=True)
class Outcome:
    """Result of a clip that was planned.

    Attributes:
        record: the clip when it was planned.
        shard: shard of its samples.
        places: places of its samples in the shard; empty if it was skipped.
        lost: why it was skipped, or which windows of it.
    """

    record: ClipRecord
    shard: str
    places: tuple[int, ...] = ()
    lost: tuple[Skipped, ...] = ()


@dataclass
class Ledger:
    """All generations of a folder."""

    folder: Path
    generations: tuple[Generation, ...]
    _indices: dict[str, ShardIndex] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """Read the files of all generations. Raises UserError if one is damaged."""
        return cls(folder, tuple(Generation.read(path) for path in sorted(folder.glob(PATTERN))))

    @property
    def removed(self) -> frozenset[str]:
        """Names of the shards that later generations replace."""
        return frozenset(name for generation in self.generations for name in generation.removed)

    @property
    def shards(self) -> list[ShardRecord]:
        """All shards that are not replaced, in order."""
        removed = self.removed
        return [one for generation in self.generations for one in generation.shards if one.name not in removed]

    @property
    def next_shard(self) -> int:
        """Number of the next shard to be planned."""
        return sum(len(generation.shards) for generation in self.generations)

    def unfinished(self) -> list[ShardRecord]:
        """List the shards that are not complete. The index is written last, so a shard with an index is complete."""
        present = {entry.name for entry in self.folder.iterdir()}
        return [one for one in self.shards if not {one.name, index_name(one.name)} <= present]

    def complete(self) -> Ledger:
        """Return the ledger of the complete shards alone."""
        missing = {one.name for one in self.unfinished()}
        parts = ((one, tuple(shard for shard in one.shards if shard.name not in missing)) for one in self.generations)
        return replace(self, generations=tuple(replace(one, shards=shards) for one, shards in parts))

    def index(self, shard: str) -> ShardIndex:
        """Read the index of a complete shard."""
        if shard not in self._indices:
            self._indices[shard] = parse_index((self.folder / index_name(shard)).read_bytes())
        return self._indices[shard]

    def delete_removed(self) -> None:
        """Delete the shards that later ones replace; only after the manifest has been written without them."""
        for name in self.removed:
            for file in (index_name(name), name):
                (self.folder / file).unlink(missing_ok=True)

    def outcomes(self) -> dict[str, Outcome]:
        """Return the latest outcome of each clip by its key, in the order of the shards."""
        found: dict[str, Outcome] = {}
        for shard in self.shards:
            self._add_outcomes(found, shard)
        return found

    def states(self) -> list[State]:
        """List the states of the folder after each generation, without those before the last removal of samples."""
        start = max((one.number for one in self.generations if one.removed), default=0)
        found: dict[str, Outcome] = {}
        dropped: defaultdict[str, list[int]] = defaultdict(list)
        removed, names, states = self.removed, list[str](), list[State]()
        for generation in self.generations:
            for shard in generation.shards:
                if shard.name not in removed:
                    names.append(shard.name)
                    for before in self._add_outcomes(found, shard):
                        dropped[before.shard].extend(before.places)
            gone, problems = set(generation.gone), len(generation.problems)
            skipped = sum(not one.places and key not in gone for key, one in found.items()) + problems
            state = State(
                shards=len(names),
                dropped={shard: _ranges(dropped[shard]) for shard in sorted(dropped)},
                longest_text=max((self.index(name).longest_text or 0 for name in names), default=0),
                clips=sum(bool(one.places) for one in found.values()) + skipped,
                skipped=skipped,
                negative_prompt=generation.prompts.negative,
                validation_prompts=generation.prompts.validation,
                text=generation.prompts.text,
            )
            states += [state] if generation.number >= start else []
        return states

    def _add_outcomes(self, found: dict[str, Outcome], shard: ShardRecord) -> list[Outcome]:
        """Add the outcomes of a shard. Returns those that they replace."""
        index, records = self.index(shard.name), {record.key: record for record in shard.clips}
        places: defaultdict[str, list[int]] = defaultdict(list)
        lost: defaultdict[str, list[Skipped]] = defaultdict(list)
        for place, entry in enumerate(index.entries):
            places[clip_of(entry.key)].append(place)
        for skipped in index.skipped:
            lost[clip_of(skipped.key)].append(skipped)
        ends = {
            key: Outcome(records[key], shard.name, tuple(places[key]), tuple(lost[key])) for key in [*places, *lost]
        }
        before = [found.pop(key) for key in ends if key in found]  # so that the order is that of the shards
        found.update(ends)
        return before


def record_of(clip: Clip) -> ClipRecord:
    """Describe a clip as it is now."""
    try:
        captions = digest(clip.read_captions())
    except (OSError, CaptionError):
        captions = ""
    return ClipRecord(clip.key, *(clip.video.stamp() if clip.video else (None, None)), captions)


def digest(captions: Sequence[str]) -> str:
    """Shorten captions to 16 characters."""
    return hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()[:16]


def live_clips(outcomes: Mapping[str, Outcome], shard: ShardRecord) -> list[ClipRecord]:
    """List those clips of a shard whose latest outcome is in it."""
    return [clip for clip in shard.clips if clip.key in outcomes and outcomes[clip.key].shard == shard.name]


def _ranges(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Join numbers to ranges (first, last + 1)."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        start = found.pop()[0] if found and found[-1][1] == number else number
        found.append((start, number + 1))
    return tuple(found)
