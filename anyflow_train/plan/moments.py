"""The moments of a step that can be the fullest. Updates are made one at a time, and of an update the terms too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from anyflow_train.config.derived import Derived
from anyflow_train.config.objective import FlowMap
from anyflow_train.config.on_policy import DistributionMatching
from anyflow_train.config.rollouts import rollout_calls
from anyflow_train.config.rows import Rows
from anyflow_train.config.run import RunConfig
from anyflow_train.plan.activations import Activations, Graphs
from anyflow_train.plan.forwards import bidirectional_share, jumped_on, remembered, trained_on, whole_clip
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
    """A network as a process holds it, and its activations on a whole clip."""

    states: States
    whole: Activations

    def on(self, rows: Rows) -> Activations:
        """On other rows."""
        return replace(self.whole, rows=rows)

    @property
    def cached(self) -> int:
        """Autocast's copies of trained weights, which it keeps until a forward ends."""
        return 2 * self.states.sizes.trained if self.whole.half else 0

    @property
    def in_graph(self) -> int:
        """Autocast's copies that a graph keeps: of all that it multiplied with, but in fp8."""
        return 2 * (self.states.sizes.whole - self.states.in_fp8) if self.whole.half else 0

    @property
    def in_block(self) -> int:
        return self.in_graph // self.whole.network.architecture.num_layers

    @property
    def lasting(self) -> int:
        """Buffers outside of backwards: stages 1 and 2 give their bucket back after each."""
        return self.states.buffers if self.states.stage == 3 else 0

    def copies(self, graphs: int) -> int:
        """Autocast's, in a backward through so many forwards; checkpointing makes a block's anew."""
        if not graphs:
            return 0
        return self.in_block if self.whole.checkpointing else graphs * self.in_graph


def update_moments(config: RunConfig, states: list[States], derived: Derived) -> list[Moment]:
    """All moments of a step's last micro-batch, of every update.

    Args:
        states: of the student; in stage 2 of the fake score and the teacher as well, in this order.
    """
    wholes = [Activations(config, derived, state.network, _whole(config, state)) for state in states]
    holders = [Holder(state, whole) for state, whole in zip(states, wholes, strict=True)]
    settings, student = config.on_policy, holders[0]
    of_objective = 2 if bidirectional_share(config) else 1
    if not isinstance(settings, DistributionMatching):
        before = of_objective * (derived.accumulation - 1)
        return [*_objective(config, student, before), _optimizer(student, "")]
    _, fake, teacher = holders
    parts = tuple(student.on(rows) for _, rows in jumped_on(config))
    encodings = tuple(student.on(rows) for _, rows in remembered(config))
    graphs = Graphs(parts, rollout_calls(settings).most_graphs)
    terms = 1 + (of_objective if settings.objective_weight else 0)
    before = terms * (derived.accumulation - 1)
    students = [
        *_regression(student, before + 1, graphs, "rollout: "),
        *(_encoding(student, each, before + 1, graphs) for each in encodings[-1:]),
        _scores(student, fake, teacher, before + 1, graphs),
        *(_objective(config, student, before + 1) if terms > 1 else ()),
        _optimizer(student, ""),
    ]
    earlier = fake.states.gradients_before(derived.accumulation)
    fakes = [
        *(_alone(student, each, earlier, "fake score's rollout") for each in (*parts, *encodings)),
        *_regression(fake, derived.accumulation, Graphs((fake.whole,)), "fake score: "),
        _optimizer(fake, "fake score: "),
    ]
    students = [moment.beside(fake.states) for moment in students]
    return [*students, *(moment.beside(student.states) for moment in fakes)]


def _whole(config: RunConfig, state: States) -> Rows:
    ((_, rows),) = whole_clip(config, state.network.architecture)
    return rows


def _objective(config: RunConfig, student: Holder, before: int) -> Iterator[Moment]:
    """Stage 0 or 1, after so many of an update's backwards."""
    largest = max((student.on(rows) for _, rows in trained_on(config)), key=lambda forward: forward.block)
    yield from _regression(student, before + 1, Graphs((largest,)), "")
    if isinstance(config.objective, FlowMap):
        half = config.objective.derivative_precision != "fp32"
        moment = _alone(student, largest, student.states.gradients_before(before + 1), "difference forward")
        wide = largest.alone(2 if half else FLOAT) + largest.rest
        yield replace(moment, activations=wide, copies=student.cached if half else 0)
    if bidirectional_share(config):
        yield from _regression(student, before + 2, Graphs((student.whole,)), "whole clip: ")


def _regression(holder: Holder, backwards: int, graphs: Graphs, prefix: str) -> Iterator[Moment]:
    """Forwards of one network and the backward through them, the last of an update's `backwards`."""
    states, largest, first = holder.states, graphs.largest, graphs.parts[0]
    before, after = states.gradients_before(backwards), states.gradients_after(backwards)
    rest = largest.rest
    now = largest.working(largest.size) + rest
    last = max(holder.cached, holder.copies(1))
    copies = last if largest.checkpointing else last + holder.copies(graphs.count - 1)
    memory = 0 if largest.checkpointing else largest.memory  # else it is kept
    yield Moment(f"{prefix}forward", before, graphs.kept + memory + now, copies, holder.lasting)
    now += largest.recomputed
    yield Moment(f"{prefix}backward begins", before, graphs.kept + now, holder.copies(graphs.count), states.buffers)
    if graphs.count > 1:
        gradients, copies = states.gradients_within(backwards), holder.copies(graphs.count - 1)
        yield Moment(f"{prefix}backward goes on", gradients, graphs.kept_without_last + now, copies, states.buffers)
    ends = first.block + first.working(first.size) + rest
    yield Moment(f"{prefix}backward ends", after, ends, holder.in_block, states.buffers)


def _scores(student: Holder, fake: Holder, teacher: Holder, backwards: int, graphs: Graphs) -> Moment:
    """Fake score and teacher judge a rollout whose graphs are alive."""
    wide = max(holder.whole.alone(student.whole.size) for holder in (fake, teacher))
    copies = fake.cached + (0 if student.whole.checkpointing else student.copies(graphs.count))
    before = student.states.gradients_before(backwards)
    return Moment("rollout: scores", before, graphs.kept + wide + graphs.largest.rest, copies, fake.lasting)


def _encoding(student: Holder, last: Activations, backwards: int, graphs: Graphs) -> Moment:
    """The last chunk's past is encoded while the graphs of all chunks before it are alive."""
    earlier = replace(graphs, parts=graphs.parts[:-1])
    copies = student.cached + (0 if last.checkpointing else student.copies(earlier.count))
    wide = last.alone(last.size) + earlier.largest.rest
    before = student.states.gradients_before(backwards)
    return Moment("rollout: encoding", before, earlier.kept + wide, copies, student.lasting)


def _alone(holder: Holder, forward: Activations, gradients: int, name: str) -> Moment:
    """A forward without gradient."""
    return Moment(name, gradients, forward.alone(forward.size) + forward.rest, holder.cached, holder.lasting)


def _optimizer(holder: Holder, prefix: str) -> Moment:
    return Moment(f"{prefix}optimizer", holder.states.gradients_applied, holder.whole.rest, 0, holder.lasting)
