"""Make the frozen parts of the tiny Wan pipeline: codec, text encoder, tokenizer, scheduler, in diffusers layout.

`python assets/tiny-wan/build/build_codec.py --out runs/codec`; `--settings FILE` takes another recipe, a JSON file with
all or some of the keys of `codec.json`.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from anyflow_train.errors import UserError
from world_text import build_text_encoder, build_tokenizer
from world_vae import CodecSettings, Phase, train_vae

SETTINGS_FILE = "codec.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the VAE of assets/tiny-wan, and add its other frozen parts.")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--settings", type=Path, help="JSON file with other settings than the shipped recipe's")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        settings = read_settings(json.loads(options.settings.read_text())) if options.settings else CodecSettings()
        train_codec(settings, options.out)
    except (UserError, OSError, ValueError) as error:
        parser.error(str(error))


def read_settings(values: dict[str, Any]) -> CodecSettings:
    """Read the recipe from the values of a JSON file. Missing keys get the values of the shipped recipe.

    Raises:
        ValueError: a key is not a setting.
    """
    try:
        phases: dict[str, Any] = {name: Phase(**values[name]) for name in ("joint", "decoder") if name in values}
        return CodecSettings(**values | phases)
    except TypeError as error:
        raise ValueError(f"the settings do not fit: {error}") from None


def train_codec(settings: CodecSettings, out: Path, report: Callable[[str], None] = print) -> None:
    """Train the codec and write `vae/ text_encoder/ tokenizer/ scheduler/` and `codec.json` under `out`.

    `out` appears only when it is complete. If it exists and was made with the same settings, nothing happens. Weights
    are float16. The transformer is added later: stage 0 trains it, and the export writes it.

    Args:
        settings: the whole recipe; it is saved as `codec.json`.
        out: the folder to make, with its parents.
        report: called with each line of progress.

    Raises:
        UserError: `out` exists and is not the result of these settings.
    """
    if out.exists():
        _check_same(settings, out)
        report(f"{out} is complete")
        return
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    train_vae(settings, report).half().save_pretrained(partial / "vae")
    build_text_encoder(settings.seed).half().save_pretrained(partial / "text_encoder")
    build_tokenizer().save_pretrained(partial / "tokenizer")
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=settings.flow_shift).save_pretrained(
        partial / "scheduler"
    )
    (partial / SETTINGS_FILE).write_text(_text(settings))
    partial.rename(out)


def _text(settings: CodecSettings) -> str:
    return json.dumps(asdict(settings), indent=2) + "\n"


def _check_same(settings: CodecSettings, out: Path) -> None:
    recipe = out / SETTINGS_FILE
    if not recipe.exists() or recipe.read_text() != _text(settings):
        raise UserError(str(out), "the folder exists and was not made with these settings; name another folder")


if __name__ == "__main__":
    main()
