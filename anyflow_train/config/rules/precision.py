"""Rules of fp8: what can multiply in 8 bits, and what must not."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.derived import needs_teacher
from anyflow_train.config.findings import Finding
from anyflow_train.config.network import Lora
from anyflow_train.config.run import RunConfig

KEY = "engine.fp8"
# Rows and columns that a GPU's kernels take.
MULTIPLE = 16


def fp8(config: RunConfig) -> Iterator[Finding]:
    """Frozen weights of the right sizes, in a run whose other products are bfloat16, but for the time derivative."""
    if config.engine.fp8 == "none":
        return
    adapted = isinstance(config.student.adapter, Lora)
    if not adapted and not needs_teacher(config):
        yield Finding(
            (KEY, "student.adapter"),
            "frozen, but nothing is: there is no teacher, and student.adapter.kind=full trains every weight; set it to "
            "none, or choose student/adapter=lora",
        )
    if config.engine.precision != "bf16":
        yield Finding(
            (KEY, "engine.precision"),
            f"frozen takes the place of bfloat16, but engine.precision={config.engine.precision}; set that to bf16, or "
            f"{KEY} to none",
        )
    derivative = config.objective.derivative
    if adapted and derivative is not None and derivative.precision == "bf16":
        yield Finding(
            (derivative.precision_key or "objective.kind", KEY),
            f"bf16 with {KEY}=frozen would take the time derivative in 8 bits, a third of which is then noise; set it "
            "to fp16 or fp32",
        )
    yield from _sizes(config)


def warnings(config: RunConfig) -> Iterator[Finding]:
    """Distribution matching lives on the difference of two scores, most of which 8 bits round away."""
    if config.engine.fp8 == "frozen" and config.on_policy.matching is not None:
        yield Finding(
            (KEY, "on_policy.kind"),
            "frozen puts an error of 24 to 47 % on the direction between teacher and fake score (bfloat16: 6 to 10 %, "
            "measured on tiny-wan); none is safer in stage 2",
        )


def _sizes(config: RunConfig) -> Iterator[Finding]:
    architecture = config.student.architecture
    widths = {
        "num_attention_heads": architecture.num_attention_heads * architecture.attention_head_dim,
        "ffn_dim": architecture.ffn_dim,
    }
    for name, width in widths.items():
        if width % MULTIPLE:
            yield Finding(
                (KEY, f"student.architecture.{name}"),
                f"frozen needs layers of multiples of {MULTIPLE} numbers, but the student's are {width} wide; set it "
                "to none",
            )
