"""Parse and check the arguments after `anyflow <command>`: group choices and `key=value`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType, QuotedString
from hydra.errors import HydraException

from anyflow_train.config.groups import EXPERIMENT, Choice, choices_for
from anyflow_train.errors import UserError
from anyflow_train.text import nearest, nearest_hint, quoted


@dataclass(frozen=True)
class Setting:
    """One parsed argument: `key` is a group or a dotted key, `text` its value as written."""

    key: str
    text: str
    parsed: Override

    @property
    def value(self) -> Any:
        """Decoded value; None if there are several (`key=a,b`)."""
        if self.parsed.is_sweep_override():
            return None
        value = self.parsed.value()
        return value.text if isinstance(value, QuotedString) else value

    def interval(self) -> tuple[float, float, bool] | None:
        """Return the ends of `interval(a,b)`, and whether it has the tag `log`; None for all other values.

        Raises:
            UserError: the ends are not in order.
        """
        value = self.parsed.value()
        if not isinstance(value, IntervalSweep):
            return None
        if value.start is None or value.end is None or value.start >= value.end:
            raise UserError(self.key, f"{self.text!r} is not a range; write interval(low,high)")
        return value.start, value.end, "log" in value.tags

    def alternatives(self) -> list[str]:
        """List the values of `key=a,b` as text that can be parsed again; one value for a plain `key=a`."""
        if not self.parsed.is_sweep_override():
            return [self.text]
        return list(self.parsed.sweep_string_iterator())


# Keys whose value is one text. It needs no quotes of its own, whatever commas, colons or brackets it has.
TEXTS = ("prompt", "negative_prompt")


def parse(arguments: Sequence[str]) -> tuple[list[Setting], list[UserError]]:
    """Parse the arguments. Return the settings, and one error for each malformed argument."""
    settings: list[Setting] = []
    errors: list[UserError] = []
    parser = OverridesParser.create()
    for argument in arguments:
        try:
            settings.append(_parse_one(parser, argument))
        except UserError as error:
            errors.append(error)
    return settings, errors


def _parse_one(parser: OverridesParser, argument: str) -> Setting:
    key, equals, text = argument.partition("=")
    key = key.lstrip("+").strip()
    if argument.startswith("~"):
        raise UserError(argument, "a key cannot be removed; give it a different value, or null if it can be empty")
    if not equals or not key:
        advice = "put a value with spaces in quotes, such as prompt='a red panda'"
        raise UserError(argument, f"is not of the form key=value or group=choice; {advice}")
    if key in TEXTS and text and not (len(text) > 1 and text[0] == text[-1] and text[0] in "'\""):
        text = quoted(text)
    try:
        parsed = parser.parse_override(f"{key}={text}")
    except HydraException as error:
        raise UserError(
            key, f"cannot read {text!r}; put values with spaces, quotes, '=' or ':' in quotes: '{key}=\"...\"'"
        ) from error
    if parsed.type is not OverrideType.CHANGE or parsed.package is not None:
        raise UserError(argument, "is not of the form key=value or group=choice")
    return Setting(key, text, parsed)


def to_hydra(settings: Sequence[Setting], groups: dict[str, dict[str, Choice]]) -> list[str]:
    """Convert to overrides for Hydra. `++key=value` lets unknown keys pass, so that the models report all of them."""
    return [f"{item.key}={item.text}" if item.key in groups else f"++{item.key}={item.text}" for item in settings]


def check(settings: Sequence[Setting], command: str, groups: dict[str, dict[str, Choice]]) -> Iterator[UserError]:
    """Yield errors of group choices, and of several values for one key."""
    for item in settings:
        if item.key.startswith("hydra"):
            yield UserError(item.key, "Hydra's own settings are not used; the run directory is <out>/<name>")
        elif item.parsed.is_sweep_override():
            yield UserError(
                item.key,
                f"{item.text!r} has several values; `anyflow sweep` runs each of them "
                f"(write a list as '{item.key}=[{item.text}]')",
            )
        elif item.key in groups:
            yield from _check_choice(command, item, groups[item.key])
        elif "." not in item.key and (group := nearest(item.key, groups, 0.8)) and item.value in list(groups[group]):
            yield UserError(item.key, f"unknown group; nearest is {group!r}")


def _check_choice(command: str, item: Setting, choices: dict[str, Choice]) -> Iterator[UserError]:
    fitting = choices_for(command, item.key, choices)
    if item.value is None and item.key == EXPERIMENT:
        return
    if not isinstance(item.value, str):
        yield UserError(
            item.key, f"{item.text!r} is not a choice of this group; valid are {', '.join(fitting) or 'none'}"
        )
    elif item.value not in choices:
        yield UserError(item.key, f"{item.value!r} does not exist{nearest_of(item.value, fitting)}")
    elif item.value not in fitting:
        yield UserError(
            item.key,
            f"{item.value!r} is for `anyflow {choices[item.value].command}`, "
            f"not for `anyflow {command}`{nearest_of(item.value, fitting)}",
        )
    elif not choices[item.value].is_global and any(choice.is_global for choice in choices.values()):
        problem = "lacks the line `# @package _global_`, without which its keys would be keys of"
        yield UserError(item.key, f"{choices[item.value].path} {problem} {item.key!r}; add the line at its top")


def nearest_of(wrong: str, valid: Sequence[str] | dict[str, Choice]) -> str:
    """Format `; nearest is 'x' (valid: ...)`, or only the valid names if none is similar."""
    hint, listed = nearest_hint(wrong, valid), ", ".join(valid)
    return f"{hint} (valid: {listed})" if hint else f"; valid are {listed or 'none'}"
