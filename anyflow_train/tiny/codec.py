"""Makes the frozen parts of the tiny Wan pipeline: codec, text encoder, tokenizer, scheduler, in diffusers layout."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from anyflow_train.errors import UserError
from anyflow_train.tiny.text import build_text_encoder, build_tokenizer
from anyflow_train.tiny.vae import CodecSettings, train_vae

SETTINGS_FILE = "codec.json"


def train_codec(settings: CodecSettings, out: Path, report: Callable[[str], None] = print) -> None:
    """Trains the codec and writes `vae/ text_encoder/ tokenizer/ scheduler/` and `codec.json` under `out`.

    `out` appears under its name only when it is complete. Where it is there already, made with the same settings,
    nothing happens. Weights are float16. There is no transformer yet: stage 0 trains it, export adds it.

    Args:
        settings: the whole recipe; saved beside the result.
        out: the folder to make; its parents are made too.
        report: takes progress lines.

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
        raise UserError(str(out), "the folder exists and was not made with these settings: give another folder")
