"""GPUs that a plan can be made for: the speeds that their makers state, and the memory that torch reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        title: name that its maker gives it.
        names: names that torch gives it.
        memory: GiB that torch reports, roughly.
        bf16: TFLOP/s of dense bfloat16 or float16 matrix products summed in float32.
        fp32: TFLOP/s in float32 without rounding to TF32, which is torch's default.
    """

    title: str
    names: tuple[str, ...]
    memory: float
    bf16: float
    fp32: float


GPUS = {
    "a100-40": Gpu("NVIDIA A100 40 GB", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 39.4, 312, 19.5),
    "a100-80": Gpu("NVIDIA A100 80 GB", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), 79.1, 312, 19.5),
    "h100-80": Gpu("NVIDIA H100 SXM 80 GB", ("NVIDIA H100 80GB HBM3",), 79.1, 989, 66.9),
    "h200-141": Gpu("NVIDIA H200 141 GB", ("NVIDIA H200",), 139.8, 989, 66.9),
    "b200-180": Gpu("NVIDIA B200 180 GB", ("NVIDIA B200",), 178.0, 2250, 75.0),
    "l40s-48": Gpu("NVIDIA L40S 48 GB", ("NVIDIA L40S",), 44.4, 362, 91.6),
    "rtx4090-24": Gpu("NVIDIA GeForce RTX 4090 24 GB", ("NVIDIA GeForce RTX 4090",), 23.5, 165, 82.6),
    "rtx3090-24": Gpu("NVIDIA GeForce RTX 3090 24 GB", ("NVIDIA GeForce RTX 3090",), 23.6, 71, 35.6),
}

TERA = 1e12


def utilisation(work: float, gpu: Gpu, world: int, seconds: float) -> float:
    """Model FLOPs utilisation: `work` operations in `seconds` on `world` GPUs, over their half-precision peak."""
    return work / (TERA * gpu.bf16 * world * seconds)


def step_seconds(operations: Mapping[str, float], gpu: Gpu, world: int, utilisation: float) -> dict[str, float]:
    """Seconds of a step's operations in `half` precision and in `float32`, at a share of the peak of each."""
    peaks = {"half": gpu.bf16, "float32": gpu.fp32}
    return {name: count / (TERA * peaks[name] * utilisation * world) for name, count in operations.items()}


def known_gpu(name: str) -> Gpu | None:
    """Find the GPU with a name of torch's; None for one that is not listed."""
    return next((gpu for gpu in GPUS.values() if name in gpu.names), None)
