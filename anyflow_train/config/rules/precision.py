"""Rules for fp8."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.derived import needs_teacher
from anyflow_train.config.findings import Finding
from anyflow_train.config.network import Lora
from anyflow_train.config.run import RunConfig

KEY = "engine.fp8"
# GPU kernels require rows and columns that are multiples of this.
MULTIPLE = 16


def fp8(config: RunConfig) -> Iterator[Finding]:
    """Check that fp8 has frozen weights of possible sizes, in a bfloat16 run with a more precise derivative."""
    if config.engine.fp8 == "none":
        return
    adapted = isinstance(config.student.adapter, Lora)
    if not adapted and not needs_teacher(config):
        yield Finding(
            (KEY, "student.adapter"),
            "'frozen' has no effect: there is no teacher, and student.adapter.kind=full trains every weight; set it to "
            "none, or choose student/adapter=lora",
        )
    if config.engine.precision != "bf16":
        yield Finding(
            (KEY, "engine.precision"),
            f"'frozen' replaces bfloat16 products, but engine.precision={config.engine.precision}; set that to bf16, "
            f"or {KEY} to none",
        )
    derivative = config.objective.derivative_role
    if adapted and derivative is not None and derivative.precision == "bf16":
        yield Finding(
            (derivative.precision_key or "objective.kind", KEY),
            f"bf16 with {KEY}=frozen would compute the time derivative in 8 bits, and about a third of it would "
            "be noise; set it to fp16 or fp32",
        )
    yield from _sizes(config)


def warnings(config: RunConfig) -> Iterator[Finding]:
    """Warn about fp8 in stage 2: it uses the small difference of two scores, which 8 bits mostly round away."""
    if config.engine.fp8 == "frozen" and config.on_policy.matching is not None:
        yield Finding(
            (KEY, "on_policy.kind"),
            "'frozen' gives the difference of teacher and fake score an error of 24 to 47 % (bfloat16: 6 to 10 %, "
            "measured on tiny-wan); 'none' is safer in stage 2",
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
                f"'frozen' requires layer widths that are multiples of {MULTIPLE}, but a width of the student is "
                f"{width}; set it to none",
            )
