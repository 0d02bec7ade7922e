"""Run training from a config: start the processes, compare what they see, resume or begin, train, and end."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing

import torch

from anyflow_train import __version__
from anyflow_train.config.derived import table
from anyflow_train.config.keys import flatten
from anyflow_train.config.run import RunConfig
from anyflow_train.data.batch import Batch
from anyflow_train.data.manifest import Manifest, unused_samples
from anyflow_train.flow.types import FlowMap
from anyflow_train.training.attention import attention_by, choose_kernel
from anyflow_train.training.checkpoints.inputs import Inputs
from anyflow_train.training.checkpoints.reading import CheckpointInfo, restore_tensors
from anyflow_train.training.checkpoints.resume import check_finished, find_resume_point
from anyflow_train.training.checkpoints.run_directory import RunDirectory
from anyflow_train.training.checkpoints.state import TrainState
from anyflow_train.training.compilation import with_working_compiler
from anyflow_train.training.engine import engine_name, set_adam_steps
from anyflow_train.training.memory_check import Forecast, Foresee, check_memory
from anyflow_train.training.processes.heartbeat import Heartbeat
from anyflow_train.training.processes.launched import PREEMPTED
from anyflow_train.training.processes.signals import stop_requests
from anyflow_train.training.processes.world import World, check_agreement, start_world
from anyflow_train.training.recipe import Recipe, build_loader, build_recipe
from anyflow_train.training.reporting.profile import Profile
from anyflow_train.training.reporting.progress import StepProgress
from anyflow_train.training.reporting.tracking import Trackers
from anyflow_train.training.start_checks import check_fp8, check_moments, check_start, check_strategy, check_tracker
from anyflow_train.training.trainer import Trainer
from anyflow_train.training.validation import Validator
from anyflow_train.training.weight_source import resolve_init_checkpoint

BuildValidator = Callable[[RunConfig, World, FlowMap | None], Validator]
"""Config, processes and the run's teacher (None if it has none) -> validator."""


def run(config: RunConfig, build_validator: BuildValidator | None = None, foresee: Foresee | None = None) -> int:
    """Train until `config.steps`, a stop signal, or too many non-finite steps. Resumes if there is a checkpoint.

    Args:
        config: config of the run; its directory is `<out>/<name>`.
        build_validator: builds the validator for `config.evaluation`; None trains without validation.
        foresee: predicts what the run needs, before it starts on GPUs; None skips the memory check and `mfu`.

    Returns:
        The exit code: `PREEMPTED` if a scheduler stopped the run before its last step, else 0.

    Raises:
        UserError: the run cannot start, resume, or continue. SharedErrors if every process reports it.
    """
    directory = RunDirectory.of(config)
    with ExitStack() as stack:
        world = start_world(config.engine)
        stop = stack.enter_context(stop_requests())
        stack.enter_context(Heartbeat(world, config.engine.timeout_seconds, directory.logs))
        check_agreement(world, run_facts(config))
        start = world.on_main(lambda: stack.enter_context(directory.locked()))
        with world.together():
            if not world.is_main:
                directory.check_shared(start)
        config = world.on_main(lambda: resolve_init_checkpoint(config, directory))
        inputs = world.on_main(lambda: Inputs.of(config, directory))
        finished = world.on_main(lambda: check_finished(directory, config, inputs))
        if finished:
            print(finished)
            return 0
        with world.together():
            check_strategy(config, engine_name())
            check_fp8(config.engine, world.device)
            check_moments(config.optimizer)
            kernel = choose_kernel(config, world.device)
        config = with_working_compiler(config, world)
        forecast = check_memory(config, world, foresee) if foresee else None
        point = world.on_main(lambda: find_resume_point(directory.checkpoints, config, inputs))
        world.on_main(lambda: check_start(config))
        if point is None:  # a resumed run continues offline instead
            world.on_main(lambda: check_tracker(config.tracker))
        else:
            config = inputs.resumed(config)
        recipe = build_recipe(config, world)
        state = restore(recipe, point)
        with world.together():
            validator = None
            if build_validator and config.evaluation.every:
                validator = build_validator(config, world, recipe.roles.teacher)
            loader = stack.enter_context(closing(build_loader(config, world, state.step)))
            stack.callback(stop.end_soon)  # before the loader closes, which waits for its threads
        check_agreement(world, data_facts(loader.shards.manifests))
        world.on_main(lambda: directory.begin(config, {**inputs.now, **(inputs.begun if point else {})}))
        progress = stack.enter_context(closing(StepProgress(config.steps, state.step, config.log)))
        trackers = stack.enter_context(closing(Trackers(config, directory if world.is_main else None, state.step)))
        progress.start(banner(config, world, point, kernel, forecast))
        if point is not None:
            progress.say(f"resuming from {point.path}")
            for line in inputs.grown(str(directory.path)):
                progress.say(line)
        for line in unused_samples(loader.shards.manifests, config.data.sizes) if config.objective.uses_clips else ():
            progress.say(line)
        stream: Iterable[Sequence[Batch]] = loader
        if config.profile:
            profile = stack.enter_context(closing(Profile(directory.profile, world, progress.say)))
            recipe, stream = profile.timed(recipe), profile.stream(loader)
        # The prediction is for steps of the largest size.
        work = forecast.work if forecast and len(config.data.sizes) == 1 else None
        trainer = Trainer(config, directory, recipe, state, progress, trackers, validator, stop, work)
        with attention_by(kernel):
            trainer.train(stream)
        preempted = signal.SIGUSR1 in world.gather(stop.signal)
        return PREEMPTED if preempted and trainer.state.step < config.steps else 0


def banner(
    config: RunConfig, world: World, point: CheckpointInfo | None, kernel: str, forecast: Forecast | None
) -> list[tuple[str, str]]:
    """List what a run shows when it starts: names and values."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    return [
        ("run", str(RunDirectory.of(config).path)),
        ("student", f"{config.student.init or 'random weights'}, {config.student.adapter.kind}"),
        *table(config, world.size),
        ("processes", f"{world.size} on {device}, {engine_name()}, {config.engine.precision}"),
        ("attention", kernel),
        *(forecast.rows(config, device, world.size) if forecast else []),
        ("start", "from the beginning" if point is None else f"step {point.state.step} of {config.steps}"),
    ]


def restore(recipe: Recipe, point: CheckpointInfo | None) -> TrainState:
    """Copy a checkpoint's tensors into the trained roles. Returns its state; without one, the initial state."""
    if point is None:
        return TrainState()
    for role, trainable in recipe.trainables.items():
        for group, entries in recipe.groups(role).items():
            restore_tensors(point.path, group, entries, recipe.world)
        set_adam_steps(trainable.engine.optimizer, point.adam_steps[role])
    return point.state


def run_facts(config: RunConfig) -> dict[str, str]:
    """Facts on which all processes must agree before they communicate: the config's keys, and the versions."""
    keys = {key: json.dumps(value) for key, value in flatten(config.model_dump(mode="json")).items()}
    return {**keys, "the version of anyflow_train": __version__, "the version of torch": torch.__version__}


def data_facts(manifests: Sequence[Manifest]) -> dict[str, str]:
    """Facts about `data.shards` on which all processes must agree."""
    content, samples = "".join(one.model_dump_json() for one in manifests), sum(one.samples for one in manifests)
    return {"data.shards": f"a manifest of {samples} samples ({hashlib.sha256(content.encode()).hexdigest()[:12]})"}
