"""Rules of stage 2: what a run on its own rollouts needs, and what contradicts it."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.findings import Finding
from anyflow_train.config.network import Lora
from anyflow_train.config.on_policy import DistributionMatching
from anyflow_train.config.run import RunConfig

KIND = "on_policy.kind"


def on_policy(config: RunConfig) -> Iterator[Finding]:
    """A flow map to roll out, a teacher to judge it, and times that hold something."""
    settings = config.on_policy.matching
    if settings is None:
        return
    if not config.objective.any_step:
        yield Finding(
            ("objective.kind", KIND),
            f"{config.objective.kind!r} trains no flow map, and on_policy.kind={settings.kind} rolls one out; "
            "choose objective=flow_map, or on_policy=none",
        )
    if config.teacher.source is None:
        yield Finding(
            ("teacher.source", KIND),
            f"null, but on_policy.kind={settings.kind} compares rollouts with a teacher; give a pipeline folder or "
            "hub id, or choose on_policy=none",
        )
    yield from _one_base(config, settings)
    for name, times in (("score_times", settings.score_times), ("fake_score.times", settings.fake_score.times)):
        if times.low >= times.high:
            key = f"on_policy.{name}"
            yield Finding(
                (f"{key}.low", f"{key}.high"), f"{times.low:g} is not below {key}.high={times.high:g}; lower it"
            )
    if max(settings.steps) == 1:
        yield Finding(
            ("on_policy.steps",),
            f"{list(settings.steps)} only ever trains the jump from noise to data; add a number above 1",
        )


def _one_base(config: RunConfig, settings: DistributionMatching) -> Iterator[Finding]:
    """Where the fake score is an adapter, student and teacher have to stand on the same network."""
    key = "on_policy.fake_score.adapter"
    if not isinstance(settings.fake_score.adapter, Lora):
        return
    if not isinstance(config.student.adapter, Lora):
        yield Finding(
            (key, "student.adapter"),
            "lora puts the fake score on the student's frozen base, but student.adapter.kind=full leaves none; choose "
            f"student/adapter=lora, or {key}.kind=full",
        )
    if settings.fake_score.init != config.teacher.source:
        yield Finding(
            ("on_policy.fake_score.init", key),
            f"{settings.fake_score.init} is not teacher.source={config.teacher.source}, but {key}.kind=lora begins as "
            f"the base that both share; give the same, or set {key}.kind=full",
        )


def warnings(config: RunConfig) -> Iterator[Finding]:
    """What is probably not meant: a student that stage 1 has not seen, a run that ends between two of its turns."""
    settings = config.on_policy.matching
    if settings is None:
        return
    if config.student.init in (None, config.teacher.source):
        yield Finding(
            ("student.init", KIND),
            f"{config.student.init} is no flow map, and stage 2 corrects one; give the run of stage 1, or its export",
        )
    if config.steps % settings.fake_score.updates:
        yield Finding(
            ("steps", "on_policy.fake_score.updates"),
            f"{config.steps} is not a multiple of on_policy.fake_score.updates={settings.fake_score.updates}: the "
            "student is updated in every first of so many steps, and the last ones only train the fake score",
        )
