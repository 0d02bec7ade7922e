"""Stage 2: distribution matching on rollouts of the student (DMD2, arXiv 2405.14867; AnyFlow's on-policy stage).

It needs a fake score, which learns the velocity of the rollouts by flow matching.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from anyflow_train.config.on_policy import Backward, ScoreTimes
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.path import expand_time, interpolate, path_velocity
from anyflow_train.flow.sampler import guided
from anyflow_train.flow.times import draw_diffusion_time
from anyflow_train.flow.types import Condition, FlowMap
from anyflow_train.objectives.guidance import square_error
from anyflow_train.objectives.rollouts import Rollout, RolloutBuffer, Rollouts
from anyflow_train.objectives.types import Loss, Roles

# Lower bound of the distance, which is 0 if the rollout equals the prediction of the teacher.
SMALLEST_DISTANCE = 1e-6


@dataclass(frozen=True)
class Direction:
    """The direction in which a rollout should move.

    Attributes:
        gradient: (B, F, C, H, W), `(fake - real) / mean |x - real|`, where fake and real are x0-predictions.
        distance: (B,) `mean |x - real|`.
    """

    gradient: Tensor
    distance: Tensor


@dataclass(frozen=True)
class DistributionMatchingObjective:
    """The student's objective of stage 2, `mean (x - sg[x - gradient])^2` on rollouts x of the student.

    Its gradient with respect to x is `2 gradient / numel`; see `Direction` for `gradient`.

    Attributes:
        rollouts: rolls out the student.
        times: distribution of the times at which the scores are compared.
        guidance_scale: CFG scale of the teacher.
        endpoints: buffer that hands x to the fake score; None keeps no rollouts.
        backward: `clip` keeps the graph of the whole rollout; `chunk` rolls out without a graph, and then computes one
            chunk after the other again. Gradients are equal, because none flows from a chunk to an earlier one.
    """

    rollouts: Rollouts
    times: ScoreTimes
    guidance_scale: float
    endpoints: RolloutBuffer | None = None
    backward: Backward = "clip"

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss:
        """Compute the losses of a batch. Gradient flows into the student only.

        Raises:
            ValueError: the roles lack a teacher or a fake score.
        """
        if roles.teacher is None or roles.fake_score is None:
            raise ValueError("distribution matching needs a teacher and a fake score among the roles")
        draw = draw.scoped("distribution matching")
        by_chunk = self.backward == "chunk"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not by_chunk):
            made = self.rollouts(roles.student, batch.condition, draw, tuple(batch.latents.shape[1:]))
        if self.endpoints is not None:
            self.endpoints.put(draw, batch.turn, made)
        teacher = guided(roles.teacher, batch.negative, self.guidance_scale)
        found = direction(teacher, roles.fake_score, made.x.detach(), batch.condition, draw, self.times)
        per_sample = square_error(made.x, (made.x - found.gradient).detach(), torch.ones_like(found.distance))
        pieces = partial(self._pieces, roles.student, batch.condition, draw, made.x, found.gradient)
        metrics = _metrics(made, found)
        return Loss(per_sample, torch.ones_like(per_sample), None, metrics, pieces if by_chunk else None)

    def _pieces(
        self, student: FlowMap, condition: Condition, draw: Draw, x: Tensor, gradient: Tensor
    ) -> Iterator[Tensor]:
        """Compute each chunk's share of the losses (B,), with the direction of the whole clip."""
        for frames, chunk in self.rollouts.replay(student, condition, draw, x):
            goal = (chunk - gradient[:, frames]).detach()
            yield (chunk - goal).square().flatten(1).sum(dim=1) / x[0].numel()


@dataclass(frozen=True)
class FakeScoreObjective:
    """The fake score's objective, `|| fake(x_t, t) - (z - x) ||^2` on detached rollouts x of the student.

    Attributes:
        rollouts: rolls out the student.
        times: distribution of the times at which the fake score learns.
        endpoints: buffer with the rollouts of the student's update; None always makes new rollouts.
    """

    rollouts: Rollouts
    times: ScoreTimes
    endpoints: RolloutBuffer | None = None

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss:
        """Compute the losses of a batch. Gradient flows into the fake score only.

        Raises:
            ValueError: the roles lack a fake score.
        """
        if roles.fake_score is None:
            raise ValueError("the fake score's objective needs a fake score among the roles")
        x0 = self._samples(roles.student, batch, draw)
        draw = draw.scoped("fake score")
        t = draw_score_time(draw, self.times)
        z = draw.normal("score noise", tuple(x0.shape[1:]))
        v = roles.fake_score(interpolate(x0, z, t), t, t, batch.condition)
        per_sample = square_error(v, path_velocity(x0, z), torch.ones_like(t))
        return Loss(per_sample, torch.ones_like(per_sample), None, {})

    @torch.no_grad()
    def _samples(self, student: FlowMap, batch: Batch, draw: Draw) -> Tensor:
        made = None if self.endpoints is None else self.endpoints.pop(draw, batch.turn)
        latent = tuple(batch.latents.shape[1:])
        made = made or self.rollouts(student, batch.condition, draw.scoped("fake score"), latent)
        return made.x


@torch.no_grad()
def direction(
    teacher: FlowMap, fake_score: FlowMap, x: Tensor, condition: Condition, draw: Draw, times: ScoreTimes
) -> Direction:
    """Compare x0-predictions of teacher and fake score for x (B, F, C, H, W), noised to a random time per sample."""
    s = draw_score_time(draw, times)
    noised = interpolate(x, draw.normal("score noise", tuple(x.shape[1:])), s)
    span = expand_time(s, x)
    real = noised - span * teacher(noised, s, s, condition)
    fake = noised - span * fake_score(noised, s, s, condition)
    distance = (x - real).abs().flatten(1).mean(dim=1)
    return Direction((fake - real) / expand_time(distance.clamp_min(SMALLEST_DISTANCE), x), distance)


def draw_score_time(draw: Draw, times: ScoreTimes) -> Tensor:
    """Draw one time per sample, (B,) float32, clamped to [times.low, times.high]."""
    return draw_diffusion_time(draw, times.distribution, times.shift, "fp32").clamp(times.low, times.high)


def _metrics(made: Rollout, found: Direction) -> dict[str, Tensor]:
    """Compute the metrics. Statistics of rollouts are named by the number of steps, the same for all samples."""
    x = made.x.detach().flatten(1)
    return {
        "direction_norm": found.gradient.flatten(1).square().mean(dim=1).sqrt(),
        "normaliser": found.distance,
        f"rollout_std_{made.steps}": x.std(dim=1),
        f"rollout_mean_{made.steps}": x.mean(dim=1),
    }
