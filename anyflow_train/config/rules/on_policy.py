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
    requires = f"but on_policy.kind={settings.kind}"
    if not config.objective.any_step:
        problem = f"{config.objective.kind!r} does not train a flow map, {requires} requires one"
        yield Finding(("objective.kind", KIND), f"{problem}; choose objective=flow_map, or on_policy=none")
    if config.teacher.source is None:
        advice = "give a pipeline folder or hub id, or choose on_policy=none"
        yield Finding(("teacher.source", KIND), f"null, {requires} compares rollouts with a teacher; {advice}")
    if settings.backward == "chunk" and config.student.architecture.causal is None:
        problem = "chunk requires a causal student, which generates a clip in chunks; set it to clip"
        yield Finding(("on_policy.backward", "student.architecture.causal"), problem)
    if isinstance(settings.fake_score.adapter, Lora):
        yield from _one_base(config, settings)
    for name, times in (("score_times", settings.score_times), ("fake_score.times", settings.fake_score.times)):
        low, high = f"on_policy.{name}.low", f"on_policy.{name}.high"
        if times.low >= times.high:
            yield Finding((low, high), f"{times.low:g} must be below {high}={times.high:g}; lower it")
    if max(settings.calls) == 1:
        problem = f"{list(settings.calls)} trains only the jump from noise to data; add a number above 1"
        yield Finding(("on_policy.calls",), problem)


def _one_base(config: RunConfig, settings: DistributionMatching) -> Iterator[Finding]:
    """Check that student and teacher share a base network, for a fake score that is an adapter."""
    key, init = "on_policy.fake_score.adapter", settings.fake_score.init
    if not isinstance(config.student.adapter, Lora):
        problem = "lora requires a frozen base of the student, but student.adapter.kind=full trains all of its weights"
        yield Finding((key, "student.adapter"), f"{problem}; choose student/adapter=lora, or {key}.kind=full")
    if init != config.teacher.source:
        problem = f"{init} must be equal to teacher.source={config.teacher.source}, because {key}.kind=lora"
        advice = f"starts from the shared base; or set {key}.kind=full"
        yield Finding(("on_policy.fake_score.init", key), f"{problem} {advice}")


def warnings(config: RunConfig) -> Iterator[Finding]:
    """Warn about a student without stage 1, and about last steps without an update of the student."""
    settings = config.on_policy.matching
    if settings is None:
        return
    if (init := config.student.init) in (None, config.teacher.source):
        problem = f"{init} is not a flow map, but stage 2 improves one; give the run of stage 1 or its export"
        yield Finding(("student.init", KIND), problem)
    key, updates = "on_policy.fake_score.updates", settings.fake_score.updates
    if config.steps % updates:
        problem = f"{config.steps} is not a multiple of {key}={updates}, the interval of the student's updates"
        yield Finding(("steps", key), f"{problem}; the last steps train only the fake score")
