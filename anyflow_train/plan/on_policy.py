"""What a step of stage 2 computes beside its stage-1 objective: rollouts, scores, and the fake score's own update."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.on_policy import DistributionMatching
from anyflow_train.config.rollouts import RolloutCalls, rollout_calls, student_turns
from anyflow_train.config.run import RunConfig
from anyflow_train.plan.forwards import jumped_on, remembered
from anyflow_train.plan.networks import the_fake_score, the_student, the_teacher
from anyflow_train.plan.parts import Cost, Part


def on_policy_parts(config: RunConfig, settings: DistributionMatching, objective: list[Part]) -> list[Part]:
    """All parts of a step of stage 2, mean over the steps.

    Args:
        objective: parts of the objective that trains beside, left out where its weight is 0.
    """
    share = student_turns(config.steps, settings) / config.steps
    calls = rollout_calls(settings)
    beside = objective if settings.objective_weight else []
    students = [*_rollout(config, calls), *_scores(config, settings), *beside]
    return [*(part.in_share(share) for part in students), *_fake_score(config, settings, calls, share)]


def _rollout(config: RunConfig, calls: RolloutCalls) -> Iterator[Part]:
    """The student's, with gradient. All graphs but the first end in latents that another made."""
    batch, main, network = config.engine.global_batch, config.engine.precision, the_student(config)
    student, memory = Cost(config, network, jumped_on(config)), Cost(config, network, remembered(config))
    yield Part("rollout, forward", batch, batch * calls.mean * student.forward, main)
    if memory.forwards:
        yield Part("rollout, chunks encoded", batch, batch * memory.forward, main)
    backward = student.backward + (calls.mean_graphs - 1) * student.backward_through
    yield Part("rollout, backward", batch, batch * backward, main)
    if student.recomputed:
        again = batch * calls.mean_graphs * student.recomputed
        yield Part("rollout, recomputed by checkpointing", batch, again, main, counts=False)


def _scores(config: RunConfig, settings: DistributionMatching) -> Iterator[Part]:
    """The forwards without gradient that say where rollouts should move."""
    batch, main = config.engine.global_batch, config.engine.precision
    teacher, fake = the_teacher(config), the_fake_score(config)
    assert teacher is not None
    assert fake is not None
    forwards = 1 if settings.guidance_scale == 1 else 2
    name = "score of the teacher" if forwards == 1 else "score of the teacher, guided"
    yield Part(name, batch, forwards * batch * Cost.whole(config, teacher).forward, main)
    yield Part("score of the fake score", batch, batch * Cost.whole(config, fake).forward, main)


def _fake_score(
    config: RunConfig, settings: DistributionMatching, calls: RolloutCalls, students_share: float
) -> Iterator[Part]:
    """Its update, in every step. It takes the student's rollouts, if it may, in the steps that have some."""
    batch, main, network = config.engine.global_batch, config.engine.precision, the_fake_score(config)
    assert network is not None
    own = 1 - students_share if settings.fake_score.rollout == "student" else 1.0
    if own:
        student = the_student(config)
        forwards = calls.mean * Cost(config, student, jumped_on(config)).forward
        forwards += Cost(config, student, remembered(config)).forward
        yield Part("fake score's own rollout", batch, batch * forwards, main).in_share(own)
    cost = Cost.whole(config, network)
    yield Part("fake score, forward", batch, batch * cost.forward, main)
    yield Part("fake score, backward", batch, batch * cost.backward, main)
    if cost.recomputed:
        again = batch * cost.recomputed
        yield Part("fake score, recomputed by checkpointing", batch, again, main, counts=False)
