"""`anyflow bench`: run every part in a process of its own, and write what they found."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from anyflow_train import __version__
from anyflow_train.bench import checks, steps
from anyflow_train.bench.notes import Notes
from anyflow_train.config.commands import BenchConfig
from anyflow_train.config.compose import compose
from anyflow_train.errors import UserError, UserErrors
from anyflow_train.files import check_own, read_json, to_json
from anyflow_train.text import markdown_table, timed_printer

PASSED, FAILED = 0, 1
KINDS = ("txt", "json", "partial")  # of the files of a part
KNOWN = ("state", "wrong", "skipped")  # what the table of all parts shows


@dataclass(frozen=True)
class Part:
    """One part of the benchmark.

    Attributes:
        call: what its process does: (notes, whether sizes are tiny, settings).
        title: for the report.
        least, most: seconds that must be left for it to begin, and that it may take.
        settings: of a measured step.
        stage: ZeRO stage of its process.
        offload: whether ZeRO keeps its part in the host's memory.
    """

    call: Any
    title: str
    least: float = 20
    most: float = 120
    settings: tuple[str, ...] = ()
    stage: int = 0
    offload: bool = False


def _step(title: str, *words: str, first: tuple[str, ...] = (), call: Any = steps.ours, most: float = 150) -> Part:
    return Part(call, title, 50, most, (*first, *words))


COMPILED = "engine.compile=true"
PARTS: Mapping[str, Part] = {
    "machine": Part(steps.machine, "machine"),
    "agreement": Part(checks.agreement, "networks and steps, against the CPU"),
    "attention": Part(checks.attention, "kernels of attention"),
    "kernels": Part(checks.kernels, "fused Triton kernels"),
    "zero2": Part(checks.zero, "two steps and a checkpoint under zero2", stage=2),
    "zero3": Part(checks.zero, "under zero3", stage=3),
    "zero3_offload": Part(checks.zero, "under zero3_offload", stage=3, offload=True),
    "eager": _step("adapters of rank 256, guided teacher", *steps.OURS),
    "compiled": _step(f"the same, {COMPILED}", *steps.OURS, COMPILED, most=240),
    "full": _step("the published recipe, all weights", *steps.PUBLISHED),
    "published": _step("published way, diffusers' network", *steps.PUBLISHED, first=("own",), call=steps.published),
    "fp8": _step(f"adapters, {COMPILED} engine.fp8=frozen", *steps.OURS, COMPILED, "engine.fp8=frozen", most=240),
    "published_attention": _step(
        "published way, our kernel of attention", *steps.PUBLISHED, first=("ours",), call=steps.published
    ),
}


def run(config: BenchConfig) -> int:
    """Run the parts one after the other. The report is written after each of them.

    Returns:
        1 if a part failed, else 0.

    Raises:
        UserError: there is no GPU, and it is not a rehearsal; settings are wrong; or files of the folder would be lost.
    """
    if not torch.cuda.is_available() and not config.rehearse:
        raise UserError("rehearse", "false, but torch finds no GPU; rehearse=true runs all parts at tiny sizes")
    out, say, start = Path(config.out).expanduser(), timed_printer(), time.monotonic()
    chosen = config.only or tuple(PARTS)
    _check_settings([PARTS[name] for name in chosen], config.settings)
    check_own(out, '"parts"', "bench.json", "bench.md", *(f"{name}.{kind}" for name in PARTS for kind in KINDS))
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    (out / "bench.json").write_bytes(to_json({"parts": found}))  # the folder is known as ours from now on
    for name in chosen:
        part, left = PARTS[name], config.limit - (time.monotonic() - start)
        if left < part.least and not config.rehearse:
            found[name] = {"state": "left out", "wrong": f"{left:.0f} s were left"}
        else:
            say(f"{name}: {part.title}")
            found[name] = _one(name, part, 2 * part.most if config.rehearse else min(part.most, left), config, out)
        state = found[name]["state"]
        say(": ".join([name, state, *(found[name][key] for key in ("wrong", "skipped") if key in found[name])]))
        facts = {"anyflow_train": __version__, "date": date.today().isoformat(), "rehearsal": config.rehearse}
        (out / "bench.json").write_bytes(to_json({**facts, "settings": config.settings, "parts": found}))
        (out / "bench.md").write_text(report(found, config.rehearse))
    print(f"\n{report(found, config.rehearse)}\n{out / 'bench.md'}, {out / 'bench.json'}, {out / '*.txt'}")
    return FAILED if any(each["state"] == "failed" for each in found.values()) else PASSED


def _check_settings(parts: Sequence[Part], settings: Sequence[str]) -> None:
    """Compose the config of every measured step. Raises UserErrors of the first one that is wrong."""
    try:
        for part in parts:
            if part.settings:
                compose("train", [*(word for word in part.settings if "=" in word), *settings], None, 1)
    except UserError as several:
        raise UserErrors(several.within("settings")) from None


def _one(name: str, part: Part, seconds: float, config: BenchConfig, out: Path) -> dict[str, Any]:
    """Run a part in a process, at most so many seconds. Returns what it found, whatever becomes of the process."""
    result, start = out / f"{name}.json", time.monotonic()
    result.unlink(missing_ok=True)
    request = [name, str(result), f"{seconds - 5:.0f}", str(config.rehearse), *part.settings]
    request += config.settings if part.settings else ()
    with (out / f"{name}.txt").open("w") as log:
        variables = {**os.environ, **launcher_of_one_process(part)}
        command = [sys.executable, "-m", "anyflow_train.bench.command", *request]
        try:
            done = subprocess.run(command, stdout=log, stderr=log, env=variables, timeout=seconds, check=False)
            code: int | str = done.returncode
        except subprocess.TimeoutExpired:
            code = f"ended at its limit of {seconds:.0f} s"
    found = read_json(result) if result.exists() else {}
    result.unlink(missing_ok=True)
    problem = "" if code == 0 else f"{code if isinstance(code, str) else f'exit code {code}'}; see {name}.txt"
    wrong = "; ".join(filter(None, (found.get("wrong"), problem)))
    state = "failed" if wrong else "skipped" if "skipped" in found else "passed"
    return {"state": state, "took": time.monotonic() - start, **found, **({"wrong": wrong} if wrong else {})}


def launcher_of_one_process(part: Part) -> dict[str, str]:
    """Variables that a launcher sets for a single process, if the part needs ZeRO."""
    if not part.stage:
        return {}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    device = "cpu" if part.offload else "none"
    zero = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(part.stage),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": device,
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": device,
    }
    return {**place, **zero, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def report(found: Mapping[str, Mapping[str, Any]], rehearsal: bool) -> str:
    """Format what was found as Markdown: a table of all parts, one of the measured steps, and all other figures."""
    machine = found.get("machine", {})
    lines = [f"# {machine.get('device', 'Unknown device')}, torch {machine.get('torch', torch.__version__)}", ""]
    lines += ["A rehearsal: sizes are tiny, and times mean nothing.", ""] if rehearsal else []
    rows = [["part", "", "result", "seconds"]]
    for name, each in found.items():
        shown = ": ".join(each[key] for key in KNOWN if key in each)
        rows.append([name, PARTS[name].title, shown, f"{each.get('took', 0):.0f}"])
    lines += markdown_table(rows)
    measured = {name: each for name, each in found.items() if "seconds" in each}
    if measured:
        lines += ["", "Steps of 4 samples on one GPU, as in a global batch of 32 on 8 GPUs:", ""]
        head = ["step", "s", "of published", "MFU", "GiB", "planned", "attention", "first step, s"]
        lines += markdown_table([head, *(_row(name, measured) for name in measured)])
    for name, each in found.items():
        others = {key: value for key, value in each.items() if isinstance(value, str) and key not in KNOWN}
        lines += ["", f"{name}:", "", *(f"* {key}: {value}" for key, value in others.items())] if others else []
    return "\n".join(lines) + "\n"


def _row(name: str, measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Write the row of a measured step. A step of the same recipe as the published way's is compared with it."""
    each, base = measured[name], measured.get("published", {}).get("seconds")
    compared = base is not None and steps.PUBLISHED[0] in PARTS[name].settings
    return [
        name,
        f"{each['seconds']:.3g}",
        f"{base / each['seconds']:.2f}x" if compared else "",
        f"{each['mfu']:.0%}" if "mfu" in each else "",
        f"{each['gib']:.2f}" if "gib" in each else "",
        f"{each['planned_gib']:.2f}" if "planned_gib" in each and PARTS[name].call is steps.ours else "",
        each["attention"],
        f"{each['first_step']:.3g}",
    ]


def main(name: str, file: str, seconds: str, rehearse: str, *settings: str) -> int:
    """Do one part, in its process."""
    notes = Notes(Path(file), float(seconds))
    PARTS[name].call(notes, rehearse == "True", list(settings))
    return PASSED


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
