"""Compare the objectives of stage 1 on travelling waves, a world so small that a run takes a minute on one core.

A teacher is trained first (1,500 steps). Every objective then trains a student with as many operations as `--steps`
steps of the first one, and stage 2 (120 steps) trains that student further. The energy distance compares 512 samples
with 2,048 clips that were not trained on, or with as many samples of the guided teacher (64 Euler steps). The error is
the rms distance to the (guided) teacher's 64 steps from the same noise. Finished students are read from FOLDER, so that
an interrupted comparison goes on.

    python benchmarks/waves.py --out runs/waves --seeds 0 1 2 --guidance 1 3
    python benchmarks/waves.py --out runs/waves --objectives lagrangian --set objective.rebalance=none --choose
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anyflow_train.config.run import RunConfig
from anyflow_train.evaluation.load import load_student, load_teacher
from anyflow_train.flow.sampler import guided, sample, sample_euler
from anyflow_train.flow.types import Condition, FlowMap
from anyflow_train.plan.dry_run import dry_run
from tests.evaluation.distances import energy_distance
from tests.training import waves
from tests.training.test_any_step import optimizer, settings, trained

CALLS, FINE, SHIFT, SAMPLES, REAL = (1, 2, 4, 8, 16), 64, 5.0, 512, 2048
STEPS_OF_STAGE_2 = 120
OBJECTIVES: dict[str, dict[str, Any]] = {
    "flow_map": {"kind": "flow_map", "velocity": "teacher", "weight": "uniform", "rebalance": "unweighted"},
    "lagrangian": {"kind": "lagrangian"},
    "semigroup": {"kind": "semigroup"},
    "flow_map+lagrangian": {"kind": "mixed", "shares": {"flow_map": 0.5, "lagrangian": 0.5, "semigroup": 0.0}},
    "flow_map+semigroup": {"kind": "mixed", "shares": {"flow_map": 0.5, "lagrangian": 0.0, "semigroup": 0.5}},
    "lagrangian+semigroup": {"kind": "mixed", "shares": {"flow_map": 0.0, "lagrangian": 0.5, "semigroup": 0.5}},
    "lagrangian, no clips": {"kind": "lagrangian", "source": "student"},
    "flow_map+lagrangian, no clips": {
        "kind": "mixed",
        "shares": {"flow_map": 0.5, "lagrangian": 0.5, "semigroup": 0.0},
        "source": "student",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=[*OBJECTIVES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=600, help="steps of the first objective (default: 600)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of stage 1, values in JSON")
    parser.add_argument("--no-stage-2", action="store_true")
    parser.add_argument("--choose", action="store_true", help="use other clips and noise than those of reports")
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher = train_teacher(options.out)
    for scale in options.guidance:
        judge = Judge(teacher, scale, 1 if options.choose else 0)
        print(row(f"teacher, w = {scale:g}", "", [judge.of_teacher()]), flush=True)
        budget = None
        for name in options.objectives:
            changes = [text.partition("=")[::2] for text in options.set]
            found: dict[str, list[Measured]] = {"stage 1": [], "stage 2": []}
            seconds: list[float] = []
            for seed in options.seeds:
                config = student(options.out, teacher, name, scale, seed, options.steps, changes)
                work = dry_run(RunConfig.model_validate(config), 1).work
                budget = budget or options.steps * work
                first, cost = made(config | {"steps": round(budget / work)})
                seconds.append(cost)
                found["stage 1"].append(judge.of_student(first))
                if not options.no_stage_2:
                    second, _ = made(stage_2(config, first))
                    found["stage 2"].append(judge.of_student(second))
            for stage, measured in found.items():
                if measured:
                    cost = f"{fmean(seconds):.0f}" if stage == "stage 1" else ""
                    print(row(f"{name}, w = {scale:g}, {stage} {' '.join(options.set)}", cost, measured), flush=True)


def train_teacher(folder: Path) -> Path:
    """Train the teacher of all students, on clips that are written to `folder / "shards"`."""
    network = folder / "teacher-network"
    if not network.exists():
        waves.write(folder / "shards", REAL, seed=1)
        config = settings(
            folder, "teacher", steps=1500, objective={"kind": "flow_matching"}, optimizer=optimizer(3e-3, 0.995)
        )
        config["student"] |= {"gate_value": 0.0, "time_frequency_limit": 0.03}
        config["times"] = {"diffusion_share": 1.0, "consistency_share": 0.0}
        trained(config)
    return network


def student(
    folder: Path, teacher: Path, name: str, scale: float, seed: int, steps: int, changes: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """The config of a student after stage 1, with changes (dotted key, value in JSON)."""
    guidance = {"guidance": "target", "guidance_scale": scale} if scale != 1 else {}
    objective = {"epsilon": 0.02, **OBJECTIVES[name], **guidance}
    if name == "semigroup":
        del objective["epsilon"]
    words = [name, f"w{scale:g}", f"seed{seed}", f"{steps}steps", *("-".join(change) for change in changes)]
    label = "_".join("".join(letter if letter.isalnum() else "-" for letter in word) for word in words)
    config = settings(folder, label, seed=seed, steps=steps, objective=objective, optimizer=optimizer(1e-3, 0.99))
    config["student"] = config["student"] | {"init": str(teacher)}
    config["teacher"] = {"source": str(teacher)}
    for key, value in changes:
        *groups, last = key.split(".")
        place = config
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = json.loads(value)
    return config


def stage_2(first: Mapping[str, Any], network: Path) -> dict[str, Any]:
    """The config of stage 2, with the objective of stage 1 trained beside."""
    config = {**first, "name": f"{first['name']}_stage2", "steps": STEPS_OF_STAGE_2}
    config["student"] = first["student"] | {"init": str(network)}
    config["optimizer"] = optimizer(2e-4, 0.97, betas=(0.0, 0.999), warmup_steps=0)
    config["on_policy"] = {
        "kind": "distribution_matching",
        "calls": [2, 4, 8],
        "objective_weight": 1.0,
        "fake_score": {"init": first["teacher"]["source"], "lr": 5e-4},
    }
    return config


def made(config: dict[str, Any]) -> tuple[Path, float]:
    """Train a student that is not finished. Returns its network's folder, and processor seconds."""
    network, note = (Path(config["out"]) / f"{config['name']}{end}" for end in ("-network", ".json"))
    if not note.exists():
        start = time.process_time()
        trained(config)
        note.write_text(json.dumps({"seconds": time.process_time() - start, "steps": config["steps"]}))
    return network, json.loads(note.read_text())["seconds"]


Measured = dict[int, tuple[float, float]]
"""Calls -> energy distance, error."""


class Judge:
    """Compares samples with the reference of a guidance scale; `choice` selects clips and noise."""

    def __init__(self, teacher: Path, scale: float, choice: int) -> None:
        texts, negative = waves.texts()
        flow_map = load_teacher(teacher).flow_map
        self._teacher: FlowMap = flow_map if scale == 1 else guided(flow_map, Condition(negative[None]), scale)
        self._condition = Condition(texts[torch.arange(SAMPLES) % waves.CLASSES])
        self._noise = noise(SAMPLES, 77 + 10 * choice)
        self._fine = self._euler(FINE)
        self._real = waves.draw(REAL, seed=2 + choice)[0]
        if scale != 1:
            condition = Condition(texts[torch.arange(REAL) % waves.CLASSES])
            self._real = sample_euler(self._teacher, noise(REAL, 78 + 10 * choice), condition, FINE, SHIFT)

    def of_teacher(self) -> Measured:
        return {calls: self._compare(self._euler(calls)) for calls in (*CALLS, 32)}

    def of_student(self, network: Path) -> Measured:
        flow_map = load_student(network).flow_map
        return {calls: self._compare(sample(flow_map, self._noise, self._condition, calls, SHIFT)) for calls in CALLS}

    @torch.inference_mode()
    def _euler(self, calls: int) -> Tensor:
        return sample_euler(self._teacher, self._noise, self._condition, calls, SHIFT)

    def _compare(self, clips: Tensor) -> tuple[float, float]:
        return energy_distance(clips, self._real), float((clips - self._fine).square().mean().sqrt())


def noise(count: int, seed: int) -> Tensor:
    return torch.randn(count, *waves.SHAPE, generator=torch.Generator().manual_seed(seed))


def row(name: str, seconds: str, measured: Sequence[Measured]) -> str:
    """One line of a Markdown table: values of all seeds, with a slash between them."""
    return f"| {name} | {seconds} | {' '.join(cells(measured, 0))} | {' '.join(cells(measured, 1))} |"


def cells(measured: Sequence[Measured], kind: int) -> Iterator[str]:
    for calls in measured[0]:
        yield "/".join(f"{one[calls][kind]:.2f}" for one in measured)


if __name__ == "__main__":
    main()
