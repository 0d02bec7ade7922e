"""Resolve `experiment=STAGE model=MODEL recipe=RECIPE` to the shipped experiment of these three."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from anyflow_train.config.groups import EXPERIMENT, Choice
from anyflow_train.config.overrides import Setting, parse
from anyflow_train.errors import UserError

STAGE, MODEL, RECIPE = "stage", "model", "recipe"
DEFAULTS = {MODEL: "wan1_3b", RECIPE: "default"}


def name_experiment(
    settings: Sequence[Setting], groups: dict[str, dict[str, Choice]]
) -> tuple[list[Setting], list[UserError]]:
    """Replace stage, model and recipe by the name of the experiment.

    Returns:
        The settings without `model` and `recipe`, and the errors of these two.
    """
    stages = groups.get(STAGE, {})
    chosen = {item.key: item.text for item in settings if item.key in (EXPERIMENT, MODEL, RECIPE)}
    if not stages or (chosen.get(EXPERIMENT) not in stages and not chosen.keys() & {MODEL, RECIPE}):
        return list(settings), []
    kept = [item for item in settings if item.key not in (EXPERIMENT, MODEL, RECIPE)]
    stage = chosen.get(EXPERIMENT)
    if stage not in stages:
        which = MODEL if MODEL in chosen else RECIPE
        said = "no experiment is given" if stage is None else f"experiment={stage} is not a stage"
        problem = f"{chosen[which]!r} requires experiment={'|'.join(stages)}, but {said}"
        return [item for item in settings if item.key not in (MODEL, RECIPE)], [UserError(which, problem)]
    model, recipe = (chosen.get(key, default) for key, default in DEFAULTS.items())
    if (name := _name(stage, model, recipe)) in groups[EXPERIMENT]:
        return [*parse([f"{EXPERIMENT}={name}"])[0], *kept], []
    every = product(groups.get(MODEL, {}), groups.get(RECIPE, {}))
    found = [pair for pair in every if _name(stage, *pair) in groups[EXPERIMENT]]
    possible = [f"model={one}" + (f" recipe={other}" if other != DEFAULTS[RECIPE] else "") for one, other in found]
    problem = f"{stage!r} has no experiment with model={model} recipe={recipe}; there are {', '.join(possible)}"
    return kept, [UserError(EXPERIMENT, problem)]


def typed_choices(group: str, groups: dict[str, dict[str, Choice]]) -> dict[str, Choice]:
    """Select the choices of a group that can be typed. Some recipes are only parts of experiments."""
    if group != RECIPE or STAGE not in groups:
        return groups[group]
    names = product(groups[STAGE], groups.get(MODEL, {}), groups[group])
    found = {recipe for stage, model, recipe in names if _name(stage, model, recipe) in groups[EXPERIMENT]}
    return {name: choice for name, choice in groups[group].items() if name in found}


def _name(stage: str, model: str, recipe: str) -> str:
    return f"{model}_{stage}" + ("" if recipe == DEFAULTS[RECIPE] else f"_{recipe}")
