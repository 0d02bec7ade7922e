"""The moments of a step that can be the fullest. Updates are made one at a time, and of an update the terms too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from anyflow_train.config.derived import Derived
from anyflow_train.config.objective import FlowMap
from anyflow_train.config.on_policy import DistributionMatching
from anyflow_train.config.rollouts import rollout_calls
from anyflow_train.config.run import RunConfig
from anyflow_train.plan.activations import Activations
from anyflow_train.plan.states import FLOAT, States


@dataclass(frozen=True)
class Moment:
    """What a process holds beside its state in one moment of a step, in bytes."""

    name: str
    gradients: int
    activations: int
    copies: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        """Bytes."""
        return self.gradients + self.activations + self.copies + self.buffers

    def beside(self, other: States) -> Moment:
        """The same, with what another network holds meanwhile."""
        gradients, buffers = self.gradients + other.gradients_always, self.buffers + other.buffers_always
        return replace(self, gradients=gradients, buffers=buffers)


@dataclass(frozen=True)
class Holder:
    """A network as a process holds it."""

    states: States
    activations: Activations

    @property
    def cached(self) -> int:
        """Autocast's copies of trained weights, which it keeps until a forward ends."""
        return 2 * self.states.sizes.trained if self.activations.half else 0

    @property
    def in_graph(self) -> int:
        """Autocast's copies that a graph keeps: of all that it multiplied with."""
        return 2 * self.states.sizes.whole if self.activations.half else 0

    @property
    def in_block(self) -> int:
        return self.in_graph // self.activations.network.architecture.num_layers

    @property
    def lasting(self) -> int:
        """Buffers outside of backwards: stages 1 and 2 give their bucket back after each."""
        return self.states.buffers if self.states.stage == 3 else 0

    def copies(self, graphs: int) -> int:
        """Autocast's, in a backward through so many forwards; checkpointing makes a block's anew."""
        if not graphs:
            return 0
        return self.in_block if self.activations.checkpointing else graphs * self.in_graph


def update_moments(config: RunConfig, states: list[States], derived: Derived) -> list[Moment]:
    """All moments of a step's last micro-batch, of every update.

    Args:
        states: of the student; in stage 2 of the fake score and the teacher as well, in this order.
    """
    holders = [Holder(state, Activations(config, derived, state.network)) for state in states]
    settings, student = config.on_policy, holders[0]
    if not isinstance(settings, DistributionMatching):
        return [*_objective(config, student, derived.accumulation), _optimizer(student, "")]
    _, fake, teacher = holders
    graphs = rollout_calls(settings).most_graphs
    terms = 2 if settings.objective_weight else 1
    students = [
        *_regression(student, terms * (derived.accumulation - 1) + 1, graphs, "rollout: "),
        _scores(student, fake, teacher, terms * (derived.accumulation - 1) + 1, graphs),
        *(_objective(config, student, terms * derived.accumulation) if terms == 2 else ()),
        _optimizer(student, ""),
    ]
    fakes = [
        _alone(student, fake.states.gradients_before(derived.accumulation), "fake score's rollout"),
        *_regression(fake, derived.accumulation, 1, "fake score: "),
        _optimizer(fake, "fake score: "),
    ]
    students = [moment.beside(fake.states) for moment in students]
    return [*students, *(moment.beside(student.states) for moment in fakes)]


def _objective(config: RunConfig, student: Holder, backwards: int) -> Iterator[Moment]:
    """Stage 0 or 1, in the last of an update's `backwards`."""
    yield from _regression(student, backwards, 1, "")
    if isinstance(config.objective, FlowMap):
        half = config.objective.derivative_precision == "bf16"
        moment = _alone(student, student.states.gradients_before(backwards), "difference forward")
        wide = student.activations.alone(2 if half else FLOAT) + student.activations.rest
        yield replace(moment, activations=wide, copies=student.cached if half else 0)


def _regression(holder: Holder, backwards: int, graphs: int, prefix: str) -> Iterator[Moment]:
    """Forwards of one network and the backward through them, the last of an update's `backwards`."""
    states, activations = holder.states, holder.activations
    before, after = states.gradients_before(backwards), states.gradients_after(backwards)
    rest, working = activations.rest, activations.working(activations.size)
    again, kept = activations.recomputed, activations.kept
    last = max(holder.cached, holder.copies(1))
    copies = last if activations.checkpointing else last + holder.copies(graphs - 1)
    yield Moment(f"{prefix}forward", before, kept(graphs) + working + rest, copies, holder.lasting)
    begins = kept(graphs) + again + working + rest
    yield Moment(f"{prefix}backward begins", before, begins, holder.copies(graphs), states.buffers)
    if graphs > 1:
        on = kept(graphs - 1) + again + working + rest
        gradients = states.gradients_within(backwards)
        yield Moment(f"{prefix}backward goes on", gradients, on, holder.copies(graphs - 1), states.buffers)
    ends = activations.block + working + rest
    yield Moment(f"{prefix}backward ends", after, ends, holder.in_block, states.buffers)


def _scores(student: Holder, fake: Holder, teacher: Holder, backwards: int, graphs: int) -> Moment:
    """Fake score and teacher judge a rollout whose graphs are alive."""
    activations = student.activations
    wide = max(holder.activations.alone(activations.size) for holder in (fake, teacher))
    copies = fake.cached + (0 if activations.checkpointing else student.copies(graphs))
    before = student.states.gradients_before(backwards)
    return Moment("rollout: scores", before, activations.kept(graphs) + wide + activations.rest, copies, fake.lasting)


def _alone(holder: Holder, gradients: int, name: str) -> Moment:
    """A forward without gradient."""
    activations = holder.activations
    return Moment(
        name, gradients, activations.alone(activations.size) + activations.rest, holder.cached, holder.lasting
    )


def _optimizer(holder: Holder, prefix: str) -> Moment:
    return Moment(f"{prefix}optimizer", holder.states.gradients_applied, holder.activations.rest, 0, holder.lasting)
