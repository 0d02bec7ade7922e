"""A process of a launch: does several cases one after the other, through the real command line."""

from __future__ import annotations

import json
import sys
from typing import Any

import deepspeed.ops
import yaml

# DeepSpeed would compile a shared-memory module for a CPU, which takes 36 s and changes no bit.
deepspeed.ops.__dict__["__compatible_ops__"] = {}

from anyflow_train import __main__ as command_line  # noqa: E402


def overrides(config: dict[str, Any], prefix: str = "") -> list[str]:
    """A nested config as `key=value` words."""
    words = []
    for key, value in config.items():
        if isinstance(value, dict) and value:
            words += overrides(value, f"{prefix}{key}.")
        else:
            words.append(f"{prefix}{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}")
    return words


def train(config: dict[str, Any]) -> int:
    return command_line.main(["train", *overrides(config)])


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        code = train(case["config"])
        print("case ended with", code, flush=True)
    sys.exit(code)
