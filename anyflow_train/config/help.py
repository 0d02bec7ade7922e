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
from anyflow_train.config.stages import MODEL, RECIPE, STAGE

WIDTH = 110
# Commands that take the keys of a run.
OF_A_RUN = ("check", "plan", "sweep")
OPTIONS = {"check": CheckOptions, "plan": PlanOptions, "sweep": SweepOptions}


def command_help(command: str, title: str, config_dir: Path | None, overrides: Sequence[str] = ()) -> str:
    """Return the help of one command: current choices of the config folders, and all keys.

    `objective.kind` among the overrides adds the keys of that objective.

    Raises:
        UserError: `objective.kind` does not name an objective.
    """
    base = "train" if command in OF_A_RUN else command
    extension = None if base in MODELS else find_extension(base)
    model = extension.model if extension else MODELS.get(base)
    if model is None:
        return f"anyflow {command}: {title}\n\nusage: anyflow {command}"
    groups = groups_of(base, find_groups(config_folders(config_dir, extension)))
    lines = [f"anyflow {command}: {title}", "", f"usage: anyflow {command} [group=choice ...] [key=value ...]"]
    if command == "sweep":
        lines += [
            "  key=a,b runs each value, in every combination with other keys of this form; write a list as 'key=[a,b]'"
        ]
    if command in OPTIONS:
        lines += ["", *_section(OPTIONS[command], "", None)]
    if base == "train":
        kinds = [setting.value for setting in parse(overrides)[0] if setting.key == "objective.kind"]
        model = run_model(kinds[-1] if kinds else None)
    lines += ["", *_experiments(command, groups), *_groups(groups), "keys:", *_section(model, "", None)]
    return "\n".join(lines)


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
        yield f"  {group + '=...':<22}{', '.join(groups[group])}"
    yield ""


def _section(model: type[Model], prefix: str, defaults: Model | None) -> Iterator[str]:
    """Yield a model's summary, its own keys, then its nested models with a heading each.

    Args:
        defaults: default instance of this model in its owner, if there is one.
    """
    yield from _wrapped(summary(model), 2)
    texts, said, nested = field_texts(model), "", list[str]()
    for name, field in model.model_fields.items():
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
