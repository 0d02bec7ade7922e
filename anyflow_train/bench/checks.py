"""Checks of `anyflow bench`: the same numbers as on a CPU, from networks, kernels, and whole steps."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflow_train.bench.notes import Notes
from anyflow_train.bench.steps import random_batches, seconds_of
from anyflow_train.config.compose import asset, compose
from anyflow_train.config.run import RunConfig
from anyflow_train.errors import reason_of
from anyflow_train.flow.draw import Draw
from anyflow_train.models import fused
from anyflow_train.models.build import build_network
from anyflow_train.models.kernels import launches_triton
from anyflow_train.models.rotary import rotation_table
from anyflow_train.training.attention import KERNELS
from anyflow_train.training.checkpoints.reading import list_checkpoints, verify_group
from anyflow_train.training.checkpoints.saving import Saver
from anyflow_train.training.checkpoints.state import TrainState
from anyflow_train.training.engine import ReplicatedEngine, adam_steps
from anyflow_train.training.gpus import TERA
from anyflow_train.training.materials import REAL, Materials
from anyflow_train.training.processes.world import ALONE, World, start_world
from anyflow_train.training.recipe import Recipe, build_recipe
from anyflow_train.training.updates import make_update

EXACT, HALF = 1e-4, 0.03
"""Largest relative differences, in the norm, of float32 and of bfloat16. Float32 sums differ in their order."""
STEP = 0.02  # of losses and gradient norms; a difference quotient multiplies float32's rounding by 100
SHAPE = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 512, "num_layers": 3, "text_dim": 64}
TINY = ("engine.precision=fp32", "engine.global_batch=4", "engine.micro_batch=2", "evaluation=none", "data.shards=none")
RUNS = {
    "stage 1": ("experiment=tiny",),
    "adapters": ("experiment=tiny", "student/adapter=lora", "student.adapter.rank=8", "objective.velocity=teacher"),
    "stage 2": ("experiment=tiny_on_policy",),
    "causal stage 2": ("experiment=tiny_causal_on_policy",),
}


@dataclass(frozen=True)
class CpuDraw(Draw):
    """Numbers of a CPU's generators on the device `target`."""

    target: torch.device = ALONE.device

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) float32."""
        return super().normal(purpose, shape).to(self.target)

    def uniform(self, purpose: str, columns: int) -> Tensor:
        """(B, columns) float32."""
        return super().uniform(purpose, columns).to(self.target)


def agreement(notes: Notes, rehearse: bool, settings: list[str]) -> None:
    """Compare outputs, gradients and whole steps with those of the CPU."""
    world = start_world(compose("train", ["experiment=tiny", *TINY], None, 1).engine)
    plain = _call(torch.device("cpu"), None)
    for name, dtype, limit in (("float32", None, EXACT), ("bfloat16", torch.bfloat16, HALF)):
        for what, found, wanted in zip(("output", "gradient"), _call(world.device, dtype), plain, strict=True):
            notes.check(f"{what} in {name}", difference(found, wanted), limit)
    for name, words in RUNS.items():
        _compare_steps(notes, name, words, world)


def zero(notes: Notes, rehearse: bool, settings: list[str]) -> None:
    """Check steps and a checkpoint under ZeRO."""
    if torch.cuda.is_available():
        zero_steps(notes)
    else:
        notes.add(skipped="on a CPU DeepSpeed would first compile C++, for minutes")


def zero_steps(notes: Notes) -> None:
    """Compare steps of the launcher's ZeRO strategy with those of one CPU process, and save a checkpoint."""
    words = RUNS["adapters"]
    world = start_world(_tiny(words).engine)
    recipe = _compare_steps(notes, "two steps", words, world)
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(_tiny(words), Path(folder), world, print)
        steps = {role: adam_steps(each.engine.optimizer) for role, each in recipe.trainables.items()}
        saver.save(TrainState(step=2), steps, recipe.groups("student"))
        saver.wait()
        saver.close()
        (saved,) = list_checkpoints(Path(folder))
        for group in recipe.groups("student"):
            verify_group(saved, group)
    notes.add(checkpoint="saved")


def attention(notes: Notes, rehearse: bool, settings: list[str]) -> None:
    """Try every kernel of attention: right, and how fast at the sizes of a clip and of a text."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    kernels = KERNELS if gpu else {"flash": SDPBackend.FLASH_ATTENTION}
    heads, size, tokens, text = (2, 64, 256, 64) if rehearse else (12, 128, 32760, 512)
    for name, kernel in kernels.items():
        with sdpa_kernel(kernel):
            try:
                notes.check(name, _attention_difference(device), HALF)
            except RuntimeError as error:
                notes.add(**{name: f"does not run here: {reason_of(error)}"})
                continue
            for keys in (tokens, text):
                notes.add(**{f"{name}, {keys} keys": _attention_speed(heads, size, tokens, keys, device)})


def kernels(notes: Notes, rehearse: bool, settings: list[str]) -> None:
    """Compare each fused Triton kernel with its formula in float64: values and gradients."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not launches_triton(torch.empty(1, device=device)):
        notes.add(skipped="Triton kernels need a GPU")
        return
    frames, tokens, heads, head_dim = (3, 42, 3, 14) if rehearse else (21, 32760, 12, 128)
    width, eps = heads * head_dim, 1e-6
    table = rotation_table(head_dim, (frames, 1, tokens // frames), device)
    weight = torch.rand(width, device=device) + 0.5
    shift, scale, gate = torch.randn(1, frames, 3, width, device=device).chunk(3, dim=2)
    for dtype, limit in ((torch.float32, EXACT), (torch.bfloat16, HALF)):
        x, y = torch.randn(2, 1, tokens, width, device=device).to(dtype)
        # In float64 there is no kernel: the formula computes.
        calls: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
            "layer norm": (lambda *given: torch.add(*fused.modulated_layer_norm(*given, eps=eps)), (x, shift, scale)),
            "gated addition": (fused.add_gated, (x, y, gate)),
            "rotated norm": (partial(fused.rotated_rms_norm, eps=eps, heads=heads, rotation=table), (x, weight)),
        }
        for name, (call, given) in calls.items():
            found, wanted = (_with_gradients(call, given, kind) for kind in (None, torch.float64))
            notes.check(f"{name}, {str(dtype).partition('.')[2]}", max(map(difference, found, wanted)), limit)


def difference(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference divided by the norm of the right tensor."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found.reshape(wanted.shape) - wanted).norm() / wanted.norm())


def _call(device: torch.device, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Output and gradient of a small network of fixed weights."""
    network = torch.nn.Module.to(build_network(SHAPE, 0), device)
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(s, generator=generator).to(device) for s in ((2, 3, 16, 16, 16), (2, 40, 64)))
    t, r = (torch.tensor(times, device=device) for times in ([700.0, 200.0], [300.0, 200.0]))
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        output = network(x, t, r, text, return_dict=False)[0].float()
    output.square().mean().backward()
    return output, torch.cat([p.grad.flatten().cpu() for p in network.parameters() if p.grad is not None])


def _tiny(words: tuple[str, ...]) -> RunConfig:
    # Experiments named tiny choose the CPU, which must not be compared with itself.
    return compose("train", [*words, *TINY, "engine.device=auto", f"student.init={asset('tiny-wan')}"], None, 1)


def _compare_steps(notes: Notes, name: str, words: tuple[str, ...], world: World) -> Recipe:
    """Make two steps on the device and on the CPU from equal random numbers, and compare their losses and gradients."""
    plain = Materials(build_engine=ReplicatedEngine, zero_stage=lambda: 0)
    wanted, _ = _two_steps(_tiny(words), ALONE, plain)
    found, recipe = _two_steps(_tiny(words), world, REAL)
    for key, value in wanted.items():
        notes.check(f"{name}, {key}", abs(found[key] - value) / abs(value), STEP)
    return recipe


def _two_steps(config: RunConfig, world: World, materials: Materials) -> tuple[dict[str, float], Recipe]:
    """Losses and gradient norms by name."""
    recipe, found = build_recipe(config, world, materials), {}
    for step in range(2):
        batches = [batch.to(world.device) for batch in random_batches(config, step, ALONE.device)]
        draws = [CpuDraw(0, step, batch.positions, ALONE.device, target=world.device) for batch in batches]
        for update in recipe.updates:
            report = make_update(update, recipe.trainables[update.role], recipe.roles, batches, draws, 1e-4, "")
            kept = {key: report.values[key] for key in ("loss", "gradient_norm")}
            found |= {f"{key} of the {update.role} in step {step}": value for key, value in kept.items()}
    return found, recipe


def _attention_difference(device: torch.device) -> float:
    query, key, value = torch.randn(3, 1, 2, 256, 64, device=device)
    found = F.scaled_dot_product_attention(query.bfloat16(), key.bfloat16(), value.bfloat16())
    return difference(found, (query.double() @ key.double().mT / 8).softmax(-1) @ value.double())


def _attention_speed(heads: int, size: int, tokens: int, keys: int, device: torch.device) -> str:
    """Time of a forward and of a backward, and operations per second."""
    shapes = [(1, heads, count, size) for count in (tokens, keys, keys)]
    query, key, value = (torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True) for s in shapes)

    def call() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    forward = seconds_of(call)
    backward = seconds_of(lambda: call().backward(query.detach())) - forward
    work = 4 * heads * size * tokens * keys / TERA
    rates = f"{work / forward:.0f} and {2.5 * work / backward:.0f} TFLOP/s"
    return f"{1e3 * forward:.2f} ms forward, {1e3 * backward:.2f} ms backward: {rates}"


def _with_gradients(call: Callable[..., Tensor], given: tuple[Tensor, ...], dtype: torch.dtype | None) -> list[Tensor]:
    """Result of a call and the gradients of its arguments, in this dtype or in their own."""
    leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in given]
    result = call(*leaves)
    result.square().sum().backward()
    return [result, *(leaf.grad for leaf in leaves if leaf.grad is not None)]
