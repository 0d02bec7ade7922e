"""`anyflow doctor`: whether training can run on this machine, one line for each thing that it needs."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from anyflow_train.errors import UserError
from anyflow_train.files import existing_part
from anyflow_train.text import GIB

READY, NOT_READY = 0, 1
LEAST_SHARED_MEMORY = 1  # GiB
LEAST_DISK = 10  # GiB; one checkpoint of a 1.3B student with adapters


@dataclass(frozen=True)
class Line:
    """One finding. Only `wrong` keeps training from running; `note` may matter to some runs."""

    state: Literal["ok", "note", "wrong"]
    text: str


def run(arguments: Sequence[str], config_dir: Path | None) -> int:
    """Print the findings.

    Returns:
        0 if training can run here (on a CPU or a GPU), else 1.

    Raises:
        UserError: there are arguments.
    """
    if arguments or config_dir:
        raise UserError((*arguments, "--config-dir")[0], "`anyflow doctor` takes no arguments")
    states = []
    for line in findings():
        print(f"{line.state:<6}{line.text}", flush=True)
        states.append(line.state)
    ready = "wrong" not in states
    print("\nTraining can run here." if ready else "\nTraining cannot run here: mend the lines that begin with `wrong`")
    return READY if ready else NOT_READY


def findings() -> Iterator[Line]:
    """Examine packages, devices, attention kernels, DeepSpeed, disks and trackers, in this order."""
    yield from _packages()
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Line("wrong", f"torch cannot be imported ({error}); install it again")
        return
    yield from _devices(torch)
    yield from _attention(torch)
    yield from _deepspeed(torch)
    yield from _memory_and_disk()
    yield from _settings()


def _packages() -> Iterator[Line]:
    """Compare versions with the bounds of this package, which are the tested ones."""
    metadata = distribution("anyflow_train").metadata
    own = SpecifierSet(metadata["Requires-Python"] or "")
    python = platform.python_version()
    fits = python in own
    yield Line("ok" if fits else "wrong", f"Python {python}" + ("" if fits else f"; anyflow_train needs {own}"))
    wrong = 0
    for text in metadata.get_all("Requires-Dist") or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            found = None
        if found is None or not wanted.specifier.contains(found, prereleases=True):
            wrong += 1
            problem = f"{wanted.name} {found or 'is not installed'}; tested with {wanted.specifier}"
            yield Line("wrong", f"{problem}: pip install '{wanted.name}{wanted.specifier}'")
    if not wrong:
        yield Line("ok", f"anyflow_train {version('anyflow_train')} and its packages have tested versions")


def _devices(torch: Any) -> Iterator[Line]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Line("ok", f"torch {torch.__version__} ({build}), {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    if not torch.cuda.is_available():
        why = "torch's CUDA build finds none: see nvidia-smi" if torch.version.cuda else "this torch is a CPU build"
        yield Line("note", f"no GPU ({why}); experiment=tiny* run on a CPU, Wan needs GPUs")
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield Line("ok", f"GPU {index}: {gpu.name}, {gpu.total_memory / GIB:.0f} GiB, compute {gpu.major}.{gpu.minor}")
        if gpu.major < 8:
            yield Line("note", f"GPU {index} has no bfloat16 products: set engine.precision=fp16 or fp32")
    if torch.distributed.is_nccl_available():
        yield Line("ok", f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    else:
        yield Line("note", "torch has no NCCL: several GPUs cannot work together")


def _attention(torch: Any) -> Iterator[Line]:
    """Try each attention kernel of torch, forward and backward."""
    from torch.nn.attention import SDPBackend

    from anyflow_train.devices import attention_works

    cuda = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    names = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    names |= {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION} if cuda else {}
    works = [name for name, kernel in names.items() if attention_works(kernel, (1, 2, 64, 64), device, dtype)]
    fails = [name for name in names if name not in works]
    state = "wrong" if not works else "note" if "flash" in fails else "ok"
    without = f"; not: {', '.join(fails)}" if fails else ""
    yield Line(state, f"attention kernels on {device}: {', '.join(works) or 'none works'}{without}")


def _deepspeed(torch: Any) -> Iterator[Line]:
    if importlib.util.find_spec("deepspeed") is None:
        yield Line("note", "DeepSpeed is not installed; ZeRO needs it: pip install 'anyflow_train[deepspeed]'")
        return
    yield Line("ok", f"DeepSpeed {version('deepspeed')}")
    if torch.cuda.is_available() and not (shutil.which("nvcc") and shutil.which("ninja")):
        yield Line("note", "no nvcc or no ninja: strategy=zero3_offload cannot build DeepSpeed's CPU Adam")


def _memory_and_disk() -> Iterator[Line]:
    import psutil

    yield Line("ok", f"{psutil.virtual_memory().total / GIB:.0f} GiB of host memory")
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).free / GIB) < LEAST_SHARED_MEMORY:
        yield Line("note", f"/dev/shm has {size:.1f} GiB free: data.workers above 0 may fail; enlarge it (--shm-size)")
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, folder in (("this folder", Path.cwd()), ("the hub cache", Path(HF_HUB_CACHE))):
        existing = existing_part(folder)
        if not existing.exists():
            yield Line("note", f"{name} ({folder}) cannot be used: the link {existing} leads nowhere")
            continue
        free = shutil.disk_usage(existing).free / GIB
        writable = os.access(existing, os.W_OK)
        state = "ok" if writable and free >= LEAST_DISK else "note"
        yield Line(state, f"{free:.0f} GiB free in {name} ({folder}){'' if writable else ', which cannot be written'}")


def _settings() -> Iterator[Line]:
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.utils import get_token

    if HF_HUB_OFFLINE:
        yield Line("note", "HF_HUB_OFFLINE is set: models come from the hub cache alone")
    elif get_token() is None:
        yield Line("note", "no Hugging Face token: public models can be loaded, nothing can be uploaded")
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    known = netrc.is_file() and "api.wandb.ai" in netrc.read_text(encoding="utf-8", errors="replace")
    if not known and "WANDB_API_KEY" not in os.environ:
        yield Line("note", "no wandb key: tracker=wandb needs `wandb login` or WANDB_MODE=offline")
    if sys.platform != "linux":
        yield Line("note", f"{platform.system()}: one process, on a CPU or one GPU; several need Linux")
