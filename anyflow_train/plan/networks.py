"""The networks that a run holds, from its config, and from those files of theirs that are here already."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anyflow_train.config.derived import adapter_on_shared_base, needs_teacher, shares_base
from anyflow_train.config.network import Architecture, FullTraining, Lora
from anyflow_train.config.on_policy import DistributionMatching
from anyflow_train.config.run import RunConfig

# Adapters on nothing: no weight is trained.
FROZEN = Lora(kind="lora", targets=())
# What a plan knows of networks that it does not download.
PUBLISHED = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Architecture(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": Architecture(),
}


@dataclass(frozen=True)
class Network:
    """One network of a run.

    Attributes:
        role: what it is for.
        adapter: what of it is trained.
        averaged: whether there is an EMA of it.
        moments: Adam's, of what it trains.
        base: whose the weights are that it does not train: its own; its own, and others stand on them (so what it
            trains whole are copies); or the student's.
        fp8: whether the frozen layers of its blocks multiply in 8 bits, or are even stored so.
        assumed: whether its architecture is only taken to be the student's.
    """

    role: Literal["student", "fake score", "teacher"]
    architecture: Architecture
    adapter: FullTraining | Lora
    averaged: bool = False
    moments: Literal["fp32", "8bit"] = "fp32"
    base: Literal["own", "lent", "student's"] = "own"
    fp8: Literal["none", "multiplied", "stored"] = "none"
    assumed: bool = False

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return self.architecture.num_attention_heads * self.architecture.attention_head_dim


def the_student(config: RunConfig) -> Network:
    """Every run has it."""
    base = "lent" if shares_base(config) else "own"
    architecture, adapter, moments = config.student.architecture, config.student.adapter, config.optimizer.moments
    return Network("student", architecture, adapter, averaged=True, moments=moments, base=base, fp8=_adapted(config))


def the_teacher(config: RunConfig) -> Network | None:
    """Where stage 1 takes its velocity from it, and in stage 2."""
    if not needs_teacher(config):
        return None
    if shares_base(config):
        return Network("teacher", config.student.architecture, FROZEN, base="student's", fp8=_adapted(config))
    found = stored_architecture(config.teacher.source)
    fp8 = "none" if config.engine.fp8 == "none" else "stored"
    return Network("teacher", found or config.student.architecture, FROZEN, fp8=fp8, assumed=found is None)


def the_fake_score(config: RunConfig) -> Network | None:
    """In stage 2: an adapter on the student's base, or a network of its own, of which all is trained."""
    if not isinstance(config.on_policy, DistributionMatching):
        return None
    adapter, moments = adapter_on_shared_base(config), config.optimizer.moments
    if adapter is not None:
        ours, fp8 = config.student.architecture, _adapted(config)
        return Network("fake score", ours, adapter, moments=moments, base="student's", fp8=fp8)
    found = stored_architecture(config.on_policy.fake_score.init)
    architecture = found or config.student.architecture
    return Network("fake score", architecture, FullTraining(), moments=moments, assumed=found is None)


def run_networks(config: RunConfig) -> list[Network]:
    """All of them, the student first."""
    others = (the_fake_score(config), the_teacher(config))
    return [the_student(config), *(network for network in others if network is not None)]


def _adapted(config: RunConfig) -> Literal["none", "multiplied"]:
    """How the base of the student's adapters multiplies."""
    return "multiplied" if config.engine.fp8 == "frozen" and isinstance(config.student.adapter, Lora) else "none"


def stored_architecture(source: str | None) -> Architecture | None:
    """The architecture of a pipeline folder, transformer folder or published network; None for all others."""
    if source is None or source in PUBLISHED:
        return PUBLISHED.get(source or "")
    for place in ("transformer", "."):
        file = Path(source) / place / "config.json"
        if not file.is_file():
            continue
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            return Architecture.model_validate({k: v for k, v in stored.items() if k in Architecture.model_fields})
        except (ValueError, AttributeError):  # a run that starts from this folder says what is wrong with it
            return None
    return None
