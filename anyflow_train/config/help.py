"""Text of `anyflow <command> --help`: groups with their choices, experiments, and every key."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from anyflow_train.config.base import Model
from anyflow_train.config.commands import CheckOptions, PlanOptions, SweepOptions
from anyflow_train.config.compose import MODELS, config_folders
from anyflow_train.config.extensions import find_extension
from anyflow_train.config.groups import EXPERIMENT, Choice, choices_for, find_groups, groups_of
from anyflow_train.config.keys import field_texts, show, summary, type_name, variants
from anyflow_train.config.overrides import parse
from anyflow_train.config.own import run_model
from anyflow_train.config.stages import MODEL, RECIPE, STAGE, typed_choices
from anyflow_train.errors import UserError
from anyflow_train.text import nearest_hint

WIDTH = 110
# Commands that take the keys of a run.
OF_A_RUN = ("check", "plan", "sweep", "launch")
EXAMPLES = {
    "clips": ["out=clips count=64"],
    "prepare": [
        "source=my_clips out=shards codec=Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "experiment=tiny_prepare source=clips out=shards",
        "experiment=tiny_prepare prompts=prompts.txt teacher=assets/tiny-wan out=shards",
    ],
    "shards": ["shards/train", "shards/train verify=true held_out=shards/held_out"],
    "check": ["experiment=wan1_3b_forward data.shards=shards"],
    "plan": ["experiment=wan14b_forward gpus=8 gpu=h100-80"],
    "train": [
        "experiment=tiny data.shards=shards",
        "experiment=wan1_3b_forward data.shards=shards name=mine",
    ],
    "sweep": ["experiment=tiny optimizer.lr=1e-3,4e-3 seed=0,1 jobs=2", "experiment=board"],
    "evaluate": ["experiment=tiny_evaluate 'models=[runs/tiny]' held_out=held_out out=report"],
    "sample": ["model=runs/tiny out=videos 'calls=[1,4]' prompt='a red ball moving left'"],
    "export": ["model=runs/tiny out=pipeline"],
    "runs": ["runs", "runs prune=true"],
    "watch": ["runs"],
    "demo": ["runs/tiny teacher=assets/tiny-wan text_length=16"],
    "completion": ["bash > ~/.local/share/bash-completion/completions/anyflow"],
    "bench": ["rehearse=true", "'only=[eager,compiled]' 'settings=[\"engine.micro_batch=1\"]'"],
    "report": ["runs/tiny out=report.html"],
    "launch": ["zero2 experiment=wan1_3b_forward data.shards=shards"],
    "distil": [
        "experiment=tiny_distil source=clips held_out=held_out_clips out=runs/mine",
        "experiment=wan1_3b source=clips strategy=zero2",
    ],
}
USAGE = {
    "completion": "bash|zsh",
    "doctor": "",
    "launch": "STRATEGY [arguments of anyflow train], or: anyflow launch slurm",
}
"""Usage of the commands that do not take keys alone."""
OPTIONS = {"check": CheckOptions, "plan": PlanOptions, "sweep": SweepOptions}


def short_help(command: str, title: str, config_dir: Path | None) -> str:
    """Return usage, examples and experiments of one command, for a command line without arguments."""
    base = "train" if command in OF_A_RUN else command
    groups = groups_of(base, find_groups(config_folders(config_dir)))
    lines = [*_start(command, title), *_experiments(command, groups)]
    has_keys = command in OF_A_RUN or command not in USAGE
    return "\n".join([*lines, *([f"`anyflow {command} --help` lists all keys."] if has_keys else [])])


def command_help(command: str, title: str, config_dir: Path | None, arguments: Sequence[str] = ()) -> str:
    """Return the help of one command: current choices of the config folders, and all keys.

    Args:
        command: name of the command.
        title: its summary.
        config_dir: the user's config folder.
        arguments: `objective.kind=...` adds the keys of that objective; a word without `=` shows only the keys that
            contain it.

    Raises:
        UserError: `objective.kind` does not name an objective, or no key contains a word.
    """
    base = "train" if command in OF_A_RUN else command
    extension = None if base in MODELS else find_extension(base)
    model = extension.model if extension else MODELS.get(base)
    if model is None:
        return "\n".join(_start(command, title))
    overrides = [argument for argument in arguments if "=" in argument]
    groups = groups_of(base, find_groups(config_folders(config_dir, extension)))
    keys: list[str] = []
    if command in OPTIONS:
        keys += [*_section(OPTIONS[command], "", None), ""]
    if base == "train":
        kinds = [setting.value for setting in parse(overrides)[0] if setting.key == "objective.kind"]
        model = run_model(kinds[-1] if kinds else None)
    keys += ["keys:", *_section(model, "", None)]
    if words := [argument for argument in arguments if "=" not in argument]:
        return "\n".join(_containing(keys, words))
    return "\n".join([*_start(command, title), *_experiments(command, groups), *_groups(groups), *keys])


def _start(command: str, title: str) -> list[str]:
    usage = USAGE.get(command, "[group=choice ...] [key=value ...]")
    lines = [f"anyflow {command}: {title}", "", f"usage: anyflow {command} {usage}".rstrip()]
    if command == "sweep":
        lines += [
            "  key=a,b runs each value, in every combination with other keys of this form; write a list as 'key=[a,b]'"
        ]
    examples = [f"  anyflow {command} {arguments}" for arguments in EXAMPLES.get(command, ())]
    return [*lines, "", *(["examples:", *examples, ""] if examples else [])]


def _containing(lines: Sequence[str], words: Sequence[str]) -> list[str]:
    """Select the keys whose name contains one of the words, with their texts, each once, and the kinds that have it."""
    entries: list[tuple[str, ...]] = []
    kind, kinds = "", list[str]()
    for line in lines:
        if line[:1].strip():
            kind = line.partition(".kind=")[2]
        elif line.startswith("    ") and line[4] != " ":
            entries.append((line,))
            kinds.append(kind)
        elif entries and line.startswith("        "):
            entries[-1] += (line,)
    owners = {entry: [kind for other, kind in zip(entries, kinds, strict=True) if other == entry] for entry in entries}
    names = {entry: entry[0].partition(":")[0].strip() for entry in entries}
    found = [entry for entry in names if any(word in names[entry] for word in words)]
    if not found:
        hint = nearest_hint(words[0], names.values())
        raise UserError("--help", f"no key contains {' or '.join(map(repr, words))}{hint}")
    shown = {entry: f"  [{', '.join(owners[entry])}]" if any(owners[entry]) else "" for entry in found}
    return [line for entry in found for line in (entry[0] + shown[entry], *entry[1:])]


def _experiments(command: str, groups: dict[str, dict[str, Choice]]) -> Iterator[str]:
    """Yield the experiments of a command, for those that take a run's keys also the experiments of `train`."""
    found = groups.get(EXPERIMENT, {})
    choices = choices_for(command, EXPERIMENT, found)
    choices |= choices_for("train", EXPERIMENT, found) if command in OF_A_RUN else {}
    if not choices:
        return
    yield f"{EXPERIMENT}=..."
    width = max(map(len, choices)) + 2
    yield from (f"  {name:<{width}}{choice.title}" for name, choice in choices.items())
    if STAGE in groups:
        yield f"{EXPERIMENT}=STAGE {MODEL}=... {RECIPE}=...: STAGE is {', '.join(groups[STAGE])}"
    yield ""


def _groups(groups: dict[str, dict[str, Choice]]) -> Iterator[str]:
    named = sorted(set(groups) - {EXPERIMENT, STAGE})
    if not named:
        return
    yield "groups:"
    for group in named:
        yield f"  {group + '=...':<22}{', '.join(typed_choices(group, groups))}"
    yield ""


def _section(model: type[Model], prefix: str, defaults: Model | None) -> Iterator[str]:
    """Yield a model's summary, its own keys, then its nested models with a heading each.

    Required keys come first, and those of its base class last.

    Args:
        defaults: default instance of this model in its owner, if there is one.
    """
    yield from _wrapped(summary(model), 2)
    texts, said, nested = field_texts(model), "", list[str]()
    for name, field in sorted(
        model.model_fields.items(), key=lambda item: (not item[1].is_required(), item[0] not in model.__annotations__)
    ):
        default = getattr(defaults, name) if defaults else field.get_default(call_default_factory=True)
        if models := variants(field.annotation):
            for inner in models:
                kind = inner.model_fields.get("kind")
                nested += ["", f"{prefix}{name}{f'.kind={type_name(kind.annotation)}' if kind else ''}"]
                nested += _section(inner, f"{prefix}{name}.", default if isinstance(default, inner) else None)
        elif name != "kind":
            value = " (required)" if field.is_required() and defaults is None else f" = {show(default)}"
            yield f"    {prefix}{name}: {type_name(field.annotation)}{value}"
            text = texts.get(name, "")
            if text != said:
                yield from _wrapped(text, 8)
            said = text
    yield from nested


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)
