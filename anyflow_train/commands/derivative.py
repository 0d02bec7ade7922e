"""`anyflow check derivative=true`: measure the error of the time derivative on a run's weights and data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from torch import nn

from anyflow_train.config.chunks import Chunks
from anyflow_train.config.commands import CheckOptions
from anyflow_train.config.objective import Derivative
from anyflow_train.config.run import RunConfig
from anyflow_train.data.batch import Batch
from anyflow_train.devices import autocast_dtype
from anyflow_train.flow.draw import Draw
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.objectives.context import in_chunks
from anyflow_train.objectives.diagnose import derivative_errors, derivative_table
from anyflow_train.training.networks import load_trained_network, start_student
from anyflow_train.training.processes.world import World, start_world
from anyflow_train.training.recipe import build_loader


def measure(config: RunConfig, options: CheckOptions) -> str:
    """Compare the central difference with the exact derivative, at several spans and in three precisions.

    Returns:
        A table of relative errors in float32, float16 and bfloat16.

    Raises:
        UserError: weights or data cannot be read.
    """
    world = start_world(config.engine)
    trained = options.derivative_weights
    network = start_student(config.student, config.seed) if trained is None else load_trained_network(trained)
    network.eval().requires_grad_(False)
    nn.Module.to(network, world.device)  # diffusers overrides `to` only for quantised networks
    networks = {name: NetworkFlowMap(network, autocast_dtype(name)) for name in ("fp32", "fp16", "bf16")}
    rows = derivative_errors(
        networks["fp32"],
        networks,
        list(_samples(config, world, options.derivative_samples)),
        options.derivative_epsilons,
        config.times.shift,
        (config.objective.derivative_role or Derivative()).ends,
    )
    return derivative_table(rows)


def _samples(config: RunConfig, world: World, count: int) -> Iterator[tuple[Batch, Draw]]:
    """Yield the first micro-batches of the run with their random draws, until there are `count` samples."""
    with closing(build_loader(config, world, 0)) as loader:
        for step, batches in enumerate(loader):
            for batch in batches:
                if count <= 0:
                    return
                count -= len(batch.positions)
                draw = Draw(config.seed, step, batch.positions, world.device)
                batch = batch.to(world.device)
                chunks = Chunks.of(config.student.architecture)
                yield in_chunks(batch, draw, chunks, config.context.long_share) if chunks else batch, draw
