"""How many network calls the rollouts of stage 2 take, from the config alone; `flow.rollout` makes them."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from statistics import fmean

from anyflow_train.config.on_policy import DistributionMatching


@dataclass(frozen=True)
class RolloutCalls:
    """Calls of one rollout over the draws of N and g, each drawn as often as any other of its kind.

    Attributes:
        fewest, most, mean: of all calls.
        mean_graphs, most_graphs: of those that the gradient goes through.
    """

    fewest: int
    most: int
    mean: float
    mean_graphs: float
    most_graphs: int


def rollout_calls(settings: DistributionMatching) -> RolloutCalls:
    """The calls that these settings lead to."""
    detached = settings.first_jump == "detached"
    calls = [[_calls(steps, index) for index in range(steps)] for steps in settings.steps]
    graphs = [[count - (detached and index > 0) for index, count in enumerate(of_steps)] for of_steps in calls]
    return RolloutCalls(
        fewest=min(map(min, calls)),
        most=max(map(max, calls)),
        mean=fmean(map(fmean, calls)),
        mean_graphs=fmean(map(fmean, graphs)),
        most_graphs=max(map(max, graphs)),
    )


def student_turns(steps: int, settings: DistributionMatching) -> int:
    """In how many of a run's steps the student is updated."""
    return ceil(steps / settings.fake_score.updates)


def _calls(steps: int, index: int) -> int:
    """The jumps 1 -> tau_g -> tau_{g+1} -> 0 without the empty ones."""
    return (index > 0) + 1 + (index < steps - 1)
