"""`anyflow codec`: trains the embedded VAE and writes the frozen parts of a tiny Wan pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from anyflow_train.config.commands import CodecConfig, CodecPhase
from anyflow_train.tiny.codec import train_codec
from anyflow_train.tiny.vae import CodecSettings, Phase


def run(config: CodecConfig) -> None:
    """Train and write to `config.out`; nothing happens where it is complete already.

    Raises:
        UserError: the folder exists and was made with other settings.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    train_codec(settings(config), Path(config.out))


def settings(config: CodecConfig) -> CodecSettings:
    """The recipe, in the form that the trainer of the VAE takes."""
    values: dict[str, Any] = {field.name: getattr(config, field.name) for field in dataclasses.fields(CodecSettings)}
    values["joint"], values["decoder"] = _phase(config.joint), _phase(config.decoder)
    return CodecSettings(**values)


def _phase(phase: CodecPhase) -> Phase:
    return Phase(phase.steps, phase.batch, phase.learning_rate)
