"""Compares a source of clips with a folder of shards, and plans the generation that adds what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from anyflow_train.data.index import Skipped
from anyflow_train.data.prepare.ledger import (
    ClipRecord,
    FolderPrompts,
    Generation,
    Ledger,
    Outcome,
    ShardRecord,
    live_clips,
)


@dataclass(frozen=True)
class Changes:
    """Keys of clips, compared with the shards.

    Attributes:
        new: clips that were never planned.
        changed: clips with another size, time or caption.
        skipped: clips that were skipped and have not changed since.
        gone: clips of the shards that the source does not have any more.
    """

    new: Sequence[str]
    changed: Sequence[str]
    skipped: Sequence[str]
    gone: Sequence[str]


@dataclass(frozen=True)
class Wanted:
    """Content that the folder shall have.

    Attributes:
        records: the clips of the source, by key, in order.
        problems: clips that could not be listed.
        negative, validation: the negative prompt and the prompts of validation.
        samples_per_shard: most clips in a shard.
        prune: remove samples of clips that are gone, and old samples of clips that have changed.
    """

    records: Mapping[str, ClipRecord]
    problems: tuple[Skipped, ...]
    negative: str
    validation: tuple[str, ...]
    samples_per_shard: int
    prune: bool = False


def find_changes(outcomes: Mapping[str, Outcome], records: Mapping[str, ClipRecord]) -> Changes:
    """Compare the clips of a source with those of the shards."""
    known = {key: (outcomes[key], record) for key, record in records.items() if key in outcomes}
    return Changes(
        new=[key for key in records if key not in outcomes],
        changed=[key for key, (before, record) in known.items() if before.record != record],
        skipped=[key for key, (before, record) in known.items() if before.record == record and not before.places],
        gone=[key for key in outcomes if key not in records],
    )


def next_generation(ledger: Ledger, wanted: Wanted, retry: bool) -> Generation | None:
    """Plan a generation with everything that the folder lacks. Returns None if it lacks nothing.

    Args:
        ledger: ledger of a folder without unfinished shards.
        wanted: what the folder shall hold.
        retry: also try skipped clips again if there is nothing else to do.
    """
    outcomes = ledger.outcomes()
    changes = find_changes(outcomes, wanted.records)
    others = {*changes.new, *changes.changed}
    number = len(ledger.generations)
    before = ledger.generations[-1].prompts if ledger.generations else None
    prompts = FolderPrompts(wanted.negative, wanted.validation)
    if before is not None:
        same = (before.negative, before.validation) == (prompts.negative, prompts.validation)
        prompts = before if same else replace(prompts, text=f"text-{number:06d}.safetensors")
    retries = {*changes.skipped} if others or (retry and prompts == before) else set[str]()
    pending = others | retries
    clips = [record for key, record in wanted.records.items() if key in pending]
    runs: list[tuple[Sequence[ClipRecord], str | None]] = [
        (clips[start : start + wanted.samples_per_shard], None)
        for start in range(0, len(clips), wanted.samples_per_shard)
    ]
    removed = _with_losses(ledger, outcomes, pending.union(changes.gone)) if wanted.prune else {}
    runs += [(kept, name) for name, kept in removed.items() if any(outcomes[one.key].places for one in kept)]
    if not runs and not removed and prompts == before:
        return None
    names = (f"shard-{number:06d}.tar" for number in range(ledger.next_shard, ledger.next_shard + len(runs)))
    return Generation(
        number=number,
        prompts=prompts,
        shards=tuple(ShardRecord(name, tuple(run), origin) for name, (run, origin) in zip(names, runs, strict=True)),
        problems=wanted.problems,
        gone=tuple(changes.gone),
        removed=tuple(removed),
        only_retries=not others and not removed and prompts == before,
    )


def _with_losses(ledger: Ledger, outcomes: Mapping[str, Outcome], lost: Iterable[str]) -> dict[str, list[ClipRecord]]:
    """List the shards with samples that are not used any more, each with its clips that stay."""
    found, lost = {}, set(lost)
    for shard in ledger.shards:
        kept = [clip for clip in live_clips(outcomes, shard) if clip.key not in lost]
        samples = sum(len(outcomes[clip.key].places) for clip in kept)
        if samples < len(ledger.index(shard.name).entries):
            found[shard.name] = kept
    return found
