"""Check the files that a run will open, without torch: manifests of shards, networks, and free disk space.

Local folders are read, and the configs of hub ids. Remote shards are checked when the run opens them.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow_train.config.derived import most_checkpoints, needs_teacher
from anyflow_train.config.network import Lora, is_in, is_target, plain
from anyflow_train.config.original import KIND, architecture, is_weights_file, read_shapes
from anyflow_train.config.parameters import layers
from anyflow_train.config.pipelines import (
    INDEX,
    SCHEDULER,
    VAE,
    check_pipeline,
    folder_reader,
    read_intact,
    weight_files,
)
from anyflow_train.config.run import RunConfig
from anyflow_train.data.manifest import MANIFEST, check_compatible, check_texts, parse_manifest, unused_samples
from anyflow_train.data.remote import is_remote
from anyflow_train.errors import UserError, raise_all, reason_of
from anyflow_train.files import check_writable, existing_part, networks_inside, open_inside
from anyflow_train.text import memory_size
from anyflow_train.training.checkpoints.network_file import NAME, NetworkFile
from anyflow_train.training.checkpoints.state import is_run, list_checkpoints
from anyflow_train.training.differences import differences, mismatches, other_interface

BYTES_PER_PARAMETER = 16
"""A checkpoint holds a float32 master, an average and two moments of every trained parameter."""
HUB_SECONDS = 5.0


@dataclass(frozen=True)
class Preflight:
    """Findings in the files of a run: errors that would end it, and warnings about files that do not exist yet."""

    errors: tuple[UserError, ...]
    warnings: tuple[UserError, ...]


def check_files(config: RunConfig) -> Preflight:
    """Read the files that a run will open, except remote shards. Returns their errors, and does not raise them."""
    errors: list[UserError] = []
    warnings: list[UserError] = []
    data, matching = config.data, config.on_policy.matching
    networks = {"student.init": config.student.init}
    networks |= {"teacher.source": config.teacher.source} if needs_teacher(config) else {}
    networks |= {"on_policy.fake_score.init": matching.fake_score.init} if matching else {}
    work = [(_shards, "data.shards", location) for location in data.locations]
    work += [(_buckets, "data.buckets", "")]
    work += [(_shards, "evaluation.held_out", config.evaluation.held_out)] if config.evaluation.every else []
    work += [(_network, key, source) for key, source in networks.items()]
    work += [(_disk, "out", config.out)]
    for read, key, source in work:
        if read is _buckets and errors:
            continue  # samples are counted in shards that fit
        try:
            for warning in read(config, key, source) if source is not None else ():
                warnings.append(UserError(key, warning))
        except UserError as error:
            named = f"{source}: " if key == "data.shards" and len(data.locations) > 1 else ""
            errors += [UserError(one.where, named + one.problem) for one in error.errors]
        except OSError as error:
            errors.append(UserError(key, f"'{error.filename or source}' cannot be read ({error.strerror})"))
    return Preflight(tuple(errors), tuple(warnings))


def _shards(config: RunConfig, key: str, location: str) -> Iterator[str]:
    if is_remote(location):
        return
    folder = Path(location).expanduser()
    path = folder / MANIFEST
    if not path.is_file():
        yield f"'{location}' has no {MANIFEST} yet; write it with `anyflow prepare`"
        return
    manifest, held_out = parse_manifest(path.read_bytes(), str(path)), key != "data.shards"
    if config.objective.uses_clips or held_out:
        check_compatible(manifest, config.data, config.student.architecture, None, key)
    else:
        check_texts(manifest, config.data, config.student.architecture, key)
    for shard in manifest.shards:
        try:
            with os.fdopen(open_inside(folder, shard.name), "rb") as file:
                size = os.fstat(file.fileno()).st_size
            found = f"has {size} bytes instead of {shard.bytes}" if shard.bytes not in (None, size) else None
        except OSError as error:
            found = "is missing" if error.errno == errno.ENOENT else f"cannot be read ({error.strerror})"
        if found:
            raise UserError(key, f"{folder / shard.name} {found}; copy it again, or prepare the shards again")
    if not manifest.samples:
        raise UserError(key, f"'{location}' contains no samples")
    count = manifest.counts.get(config.data.size, manifest.samples)
    if held_out and count < config.evaluation.samples:
        wanted = config.evaluation.samples
        yield f"'{location}' has {count} clips, but evaluation.samples={wanted}: its captions are used again"


def _buckets(config: RunConfig, key: str, _location: str) -> Iterator[str]:
    paths = [Path(location).expanduser() / MANIFEST for location in config.data.locations]
    if not config.objective.uses_clips or not all(path.is_file() for path in paths):
        return
    manifests = [parse_manifest(path.read_bytes(), str(path)) for path in paths]
    held = dict.fromkeys(size for manifest in manifests for size, count in manifest.counts.items() if count)
    if missing := [str(size) for size in config.data.sizes if size not in held]:
        problem = f"data.shards holds no clips of {', '.join(missing)}, only of {', '.join(map(str, held))}"
        advice = "remove the others" if config.data.buckets else "set it to some of these"
        raise UserError(key, f"{problem}; {advice}, or add shards that do")
    yield from unused_samples(manifests, config.data.sizes)


def _network(config: RunConfig, key: str, source: str) -> Iterator[str]:
    path = Path(source).expanduser()
    if is_run(path):
        found = [path] if (path / "state.json").is_file() else list_checkpoints(path / "checkpoints")
        if not found:
            raise UserError(key, f"'{source}' contains no checkpoint; train it first")
        # All checkpoints of a run have the same network.
        content = read_intact(found[-1] / NAME)
        if not content:
            return  # of an older version, which the run itself can read
        before = NetworkFile.of_file(content, str(found[-1] / NAME))
        arguments = before.arguments
        errors = differences(config.student, arguments, source)
    else:
        try:
            arguments = _arguments(key, path, source)
        except OSError as error:
            yield f"'{source}' {error}"
            return
        ours = config.student.architecture.model_dump(exclude={"causal"})
        theirs = {name: plain(arguments[name]) for name in ours if name in arguments}
        errors = mismatches([(f"student.architecture.{name}", ours[name], theirs[name]) for name in theirs], source)
    if key == "student.init":
        raise_all(errors)
    raise_all(other_interface(key, source, arguments, config.student.architecture))


def _arguments(key: str, path: Path, source: str) -> Mapping[str, Any]:
    """Read the config of a network. Raises FileNotFoundError like `_folder`, and UserError if it does not fit."""
    if is_weights_file(path):
        return architecture(read_shapes(path), source)
    folder = _folder(path, source)
    arguments = read_intact(folder / "config.json")
    if not arguments:
        problem = f"'{source}' contains neither transformer/config.json nor config.json"
        raise UserError(key, problem + networks_inside(path, "checkpoints", "transformer"))
    # The run downloads the weights of a hub id.
    shapes = [read_shapes(file) for file in (weight_files(folder) if path.is_dir() else ())]
    if arguments.get("_class_name") == KIND:
        arguments = architecture({name: shape for file in shapes for name, shape in file.items()}, source)
    check_pipeline(source, arguments, folder_reader(folder))
    return arguments


def _folder(path: Path, source: str) -> Path:
    """Find the folder of a pipeline's transformer, or download the configs of a hub id to the cache.

    Raises:
        FileNotFoundError: there is no folder, and the hub cannot be reached or does not provide the pipeline.
    """
    if path.is_dir():
        return path / "transformer" if (path / "transformer").is_dir() else path
    if path.is_absolute() or source.count("/") != 1:
        raise FileNotFoundError("does not exist yet")
    # Imported here, because a run on local folders does not need it.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        config = hf_hub_download(source, "transformer/config.json", etag_timeout=HUB_SECONDS)
        for name in (INDEX, VAE, SCHEDULER):
            with suppress(OSError):
                hf_hub_download(source, name, etag_timeout=HUB_SECONDS)
    except LocalEntryNotFoundError:
        problem = "is not in the hub cache, and the hub cannot be reached; the run downloads it"
        raise FileNotFoundError(problem) from None
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        problem = f"does not exist yet, also not as a hub id: {reason_of(error)}"
        raise FileNotFoundError(problem) from None
    return Path(config).parent


def _disk(config: RunConfig, _key: str, folder: str) -> Iterator[str]:
    """Warn if the disk has no room for the checkpoints that the run keeps, and the one being written."""
    out = Path(folder).expanduser()
    check_writable(out)
    free = shutil.disk_usage(existing_part(out)).free
    copies, size = most_checkpoints(config), BYTES_PER_PARAMETER * trained_parameters(config)
    if copies * size > free:
        needed = f"{copies} checkpoints of {memory_size(size)} (checkpoint.keep and keep_every)"
        yield f"'{config.out}' has {memory_size(free)} of free disk, but {needed} need more; free some space"


def trained_parameters(config: RunConfig) -> int:
    """Count the student's trained parameters in linear layers, which are nearly all of them."""
    adapter, count = config.student.adapter, 0
    for name, sides in layers(config.student.architecture).items():
        if sides is None:
            continue
        if not isinstance(adapter, Lora) or is_in(name, adapter.full_modules):
            count += math.prod(sides)
        elif is_target(name, adapter.targets):
            count += adapter.rank * sum(sides)
    return count
