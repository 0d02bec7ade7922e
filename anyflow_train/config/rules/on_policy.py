"""Rules for stage 2, training on the student's own rollouts."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.findings import Finding
from anyflow_train.config.network import Lora
from anyflow_train.config.on_policy import DistributionMatching
from anyflow_train.config.run import RunConfig

KIND = "on_policy.kind"


def on_policy(config: RunConfig) -> Iterator[Finding]:
    """Check that stage 2 has a flow map, a teacher, and possible times and steps."""
    settings = config.on_policy.matching
    if settings is None:
        return
    if not config.objective.any_step:
        yield Finding(
            ("objective.kind", KIND),
            f"{config.objective.kind!r} does not train a flow map, but on_policy.kind={settings.kind} requires one; "
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
                (f"{key}.low", f"{key}.high"), f"{times.low:g} must be below {key}.high={times.high:g}; lower it"
            )
    if max(settings.steps) == 1:
        yield Finding(
            ("on_policy.steps",),
            f"{list(settings.steps)} trains only the jump from noise to data; add a number above 1",
        )


def _one_base(config: RunConfig, settings: DistributionMatching) -> Iterator[Finding]:
    """Check that student and teacher share a base network if the fake score is an adapter."""
    key = "on_policy.fake_score.adapter"
    if not isinstance(settings.fake_score.adapter, Lora):
        return
    if not isinstance(config.student.adapter, Lora):
        yield Finding(
            (key, "student.adapter"),
            "lora requires a frozen base of the student, but student.adapter.kind=full trains all of its weights; "
            f"choose student/adapter=lora, or {key}.kind=full",
        )
    if settings.fake_score.init != config.teacher.source:
        yield Finding(
            ("on_policy.fake_score.init", key),
            f"{settings.fake_score.init} must be equal to teacher.source={config.teacher.source}, because "
            f"{key}.kind=lora starts from the shared base; or set {key}.kind=full",
        )


def warnings(config: RunConfig) -> Iterator[Finding]:
    """Warn about a student without stage 1, and about last steps without an update of the student."""
    settings = config.on_policy.matching
    if settings is None:
        return
    if config.student.init in (None, config.teacher.source):
        yield Finding(
            ("student.init", KIND),
            f"{config.student.init} is not a flow map, but stage 2 improves one; give the run of stage 1 or its export",
        )
    if config.steps % settings.fake_score.updates:
        yield Finding(
            ("steps", "on_policy.fake_score.updates"),
            f"{config.steps} is not a multiple of on_policy.fake_score.updates={settings.fake_score.updates}, the "
            "interval of the student's updates; the last steps train only the fake score",
        )
