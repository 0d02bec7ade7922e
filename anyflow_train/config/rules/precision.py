"""Rules for the precision of frozen weights."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.derived import needs_teacher
from anyflow_train.config.findings import Finding
from anyflow_train.config.network import Lora
from anyflow_train.config.run import RunConfig

KEY = "engine.fp8"
# GPU kernels require rows and columns that are multiples of this.
MULTIPLE = 16


def frozen(config: RunConfig) -> Iterator[Finding]:
    """Check that frozen weights are not rounded in a run that computes in float32."""
    if config.engine.precision == "fp32" and config.engine.frozen_precision == "bf16":
        problem = "bf16 rounds the frozen weights of a run in which engine.precision=fp32; set it to fp32 or null"
        yield Finding(("engine.frozen_precision", "engine.precision"), problem)


def fp8(config: RunConfig) -> Iterator[Finding]:
    """Check that fp8 has frozen weights of possible sizes, in a bfloat16 run with a more precise derivative."""
    if config.engine.fp8 == "none":
        return
    adapted = isinstance(config.student.adapter, Lora)
    if not adapted and not needs_teacher(config):
        problem = "'frozen' has no effect: there is no teacher, and student.adapter.kind=full trains every weight"
        yield Finding((KEY, "student.adapter"), f"{problem}; set it to none, or choose student/adapter=lora")
    if (precision := config.engine.precision) != "bf16":
        problem = f"'frozen' replaces bfloat16 products, but engine.precision={precision}"
        yield Finding((KEY, "engine.precision"), f"{problem}; set that to bf16, or {KEY} to none")
    derivative = config.objective.derivative_role
    if adapted and derivative is not None and derivative.precision == "bf16":
        problem = f"bf16 with {KEY}=frozen would compute the time derivative in 8 bits"
        keys = (derivative.precision_key or "objective.kind", KEY)
        yield Finding(keys, f"{problem}, and about a third of it would be noise; set it to fp16 or fp32")
    shape = config.student.architecture
    sizes = {"num_attention_heads": shape.num_attention_heads * shape.attention_head_dim, "ffn_dim": shape.ffn_dim}
    for name, width in sizes.items():
        if width % MULTIPLE:
            problem = f"'frozen' requires layer widths that are multiples of {MULTIPLE}"
            advice = f"but a width of the student is {width}; set it to none"
            yield Finding((KEY, f"student.architecture.{name}"), f"{problem}, {advice}")


def warnings(config: RunConfig) -> Iterator[Finding]:
    """Warn about fp8 that is slow, or used in stage 2: 8 bits mostly round away the small difference of two scores."""
    if config.engine.fp8 == "frozen" and not config.engine.compile and config.engine.device != "cpu":
        problem = "'frozen' scales each input in separate kernels, and is slower than bfloat16 on a GPU"
        yield Finding((KEY, "engine.compile"), f"{problem}; set engine.compile=true, which fuses them")
    if config.engine.fp8 == "frozen" and config.on_policy.matching is not None:
        problem = "'frozen' gives the difference of teacher and fake score an error of 24 to 47 %"
        measured = "bfloat16: 6 to 10 %, measured on tiny-wan"
        yield Finding((KEY, "on_policy.kind"), f"{problem} ({measured}); 'none' is safer in stage 2")
