"""`anyflow codec`: its config says the same as the trainer's own settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyflow_train.commands import codec
from anyflow_train.config.commands import CodecConfig
from anyflow_train.config.compose import compose
from anyflow_train.tiny.vae import CodecSettings, Phase


def test_the_shipped_recipe_is_the_trainers_default() -> None:
    config: CodecConfig = compose("codec", ["experiment=tiny_vae", "out=somewhere"])
    assert codec.settings(config) == CodecSettings()


def test_every_setting_can_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    received = []
    monkeypatch.setattr(codec, "train_codec", lambda settings, out: received.append((settings, out)))
    given = ["experiment=tiny_vae", "out=somewhere", "joint={steps: 1, batch: 2, learning_rate: 0.5}", "seed=3"]
    codec.run(compose("codec", given))
    settings, out = received[0]
    assert out == Path("somewhere")
    assert (settings.joint, settings.seed) == (Phase(1, 2, 0.5), 3)
