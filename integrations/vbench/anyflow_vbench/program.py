"""Find and run VBench, read its results, and compute its overall scores.

Written for VBench 0.1.5 (github.com/Vchitect/VBench, Huang et al., arXiv 2311.17982). VBench requires older versions of
packages than anyflow_train, so it runs in a separate Python environment.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from anyflow_train.errors import UserError
from anyflow_vbench.config import DIMENSIONS, Dimension, VBenchConfig

INSTALL = (
    "python3.10 -m venv vbench-env && "
    "vbench-env/bin/pip install 'torch<2.6' torchvision --index-url https://download.pytorch.org/whl/cu118 && "
    "vbench-env/bin/pip install vbench 'setuptools<70'"
)
ALONE = "set score=false to write only the videos"
PROBE = """
import json, pathlib, vbench.launch.evaluate, torch
info = pathlib.Path(vbench.__file__).with_name("VBench_full_info.json")
print(json.dumps({"info": str(info), "gpus": torch.cuda.device_count()}))
"""
LOG = "vbench.log"

QUALITY: tuple[Dimension, ...] = DIMENSIONS[:7]
SEMANTIC: tuple[Dimension, ...] = DIMENSIONS[7:]
RANGES: Mapping[Dimension, tuple[float, float]] = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
"""Lowest and highest score of dimensions whose range is not [0, 1]."""
WEIGHTS: Mapping[Dimension, float] = {"dynamic_degree": 0.5}
"""Weight of a dimension in its mean (quality or semantic), if it is not 1."""
QUALITY_WEIGHT = 4.0
"""Weight of the quality score relative to the semantic score."""


@dataclass(frozen=True)
class VBench:
    """An installation of VBench.

    Attributes:
        python: Python interpreter with VBench installed.
        info: VBench's list of prompts; None if the user has their own prompts.
        gpus: number of GPUs to score on.
    """

    python: str
    info: Path | None
    gpus: int

    def command(self, videos: Path, prompts: Path, dimension: Dimension, out: Path) -> list[str]:
        """Return the command line that scores one dimension of a folder of videos.

        VBench's own `vbench evaluate` calls the same module through a shell, and hides failures.

        Args:
            prompts: JSON file, name of each video -> prompt, for a user's own prompts.
            out: folder for the result.
        """
        suite = ["--mode", "custom_input", "--prompt_file", str(prompts)]
        if self.info is not None:
            suite = ["--full_json_dir", str(self.info)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.gpus)]
        wanted = ["--videos_path", str(videos), "--dimension", dimension, "--output_path", str(out)]
        return [self.python, *launcher, "-m", "vbench.launch.evaluate", *wanted, *suite]


def find_vbench(config: VBenchConfig) -> VBench:
    """Find the installation that the config names. VBench is started only if the config requires it.

    Raises:
        UserError: VBench is required but not installed, or it finds too few GPUs.
    """
    python = sys.executable if config.python is None else str(Path(config.python).expanduser())
    info = None if config.info is None else Path(config.info).expanduser().absolute()
    needs_info = config.prompts is None and info is None
    if config.score or needs_info:
        found = _probe(python)
        if config.score and found["gpus"] < config.gpus:
            problem = f"{config.gpus}, but torch of {python} finds {found['gpus']}, and VBench scores only on GPUs"
            raise UserError("gpus", f"{problem}; {ALONE}")
        info = Path(found["info"]) if needs_info else info
    return VBench(python, info, config.gpus)


def _probe(python: str) -> dict:
    try:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError("python", f"'{python}' cannot be started: {error.strerror}; {ALONE}") from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UserError(
            "python",
            f"{python} cannot import VBench ({reason[0]}). Install it in a separate environment: `{INSTALL}`; then set "
            f"python=vbench-env/bin/python. Without VBench, {ALONE}, with the prompts in info=FILE",
        )
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Result:
    """Result of VBench for one dimension.

    Attributes:
        score: higher is better, mostly from 0 to 1.
        files: file names of the scored videos.
    """

    score: float
    files: frozenset[str]


def score(command: list[str], dimension: Dimension, out: Path) -> Result:
    """Run VBench's command and write its output to `vbench.log`.

    Raises:
        UserError: VBench failed or gave no score.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOG, "w", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    result = read_result(out, dimension)
    if code or result is None:
        reason = _reason(out / LOG) or (f"exit code {code}" if code else "no score")
        raise UserError("dimensions", f"VBench failed for {dimension}: {reason}; see {out / LOG}")
    return result


def read_result(folder: Path, dimension: Dimension) -> Result | None:
    """Read the last result in a folder; None if there is no result.

    VBench writes `results_<date and time>_eval_results.json`: dimension -> [score, [a mapping for each video]].
    """
    files = sorted(folder.glob("*_eval_results.json"))
    if not files:
        return None
    try:
        value, videos = json.loads(files[-1].read_text(encoding="utf-8"))[dimension]
        result = Result(float(value), frozenset(Path(video["video_path"]).name for video in videos))
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"is not a result of VBench for {dimension}: {type(error).__name__}: {error}; remove it"
        raise UserError(str(files[-1]), problem) from None
    return result if math.isfinite(result.score) else None


def overall(scores: Mapping[Dimension, float]) -> dict[str, float]:
    """Compute `quality`, `semantic` and `total`, each only if all of its dimensions are present.

    Each is a weighted mean of scores that are mapped from their range to [0, 1]. Ranges and weights are from VBench's
    scripts/constant.py (commit 45e79ec), as used in its scripts/cal_final_score.py.
    """
    means = {"quality": _mean(scores, QUALITY), "semantic": _mean(scores, SEMANTIC)}
    found = {name: mean for name, mean in means.items() if mean is not None}
    if len(found) == 2:
        found["total"] = (QUALITY_WEIGHT * found["quality"] + found["semantic"]) / (QUALITY_WEIGHT + 1)
    return found


def _mean(scores: Mapping[Dimension, float], names: tuple[Dimension, ...]) -> float | None:
    if not scores.keys() >= set(names):
        return None
    total = 0.0
    for name in names:
        low, high = RANGES.get(name, (0.0, 1.0))
        total += WEIGHTS.get(name, 1.0) * (scores[name] - low) / (high - low)
    return total / sum(WEIGHTS.get(name, 1.0) for name in names)


def _reason(log: Path) -> str | None:
    """Find the last line of a log with an exception."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    named = (re.match(r"(?:\[rank\d+\]: )?([\w.]+(?:Error|Exception): \S.*)", line) for line in reversed(lines))
    return next((found[1] for found in named if found), None)
