"""Cases of the sequence-parallel tests. The test runs them with one process, and `main` with two."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from anyflow_train.config.network import Lora
from anyflow_train.models.adapters import add_lora
from anyflow_train.models.transformer import AnyFlowTransformer3DModel
from tests.models.networks import inputs, small


@dataclass(frozen=True)
class Case:
    """A call of a small network of four heads, 12 positions in each of three frames, as a change of `inputs()`."""

    changes: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[AnyFlowTransformer3DModel], None] = lambda network: None
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _adapt(network: AnyFlowTransformer3DModel) -> None:
    """Set adapters to nonzero values. After `add_lora`, half of their gradients would be zero."""
    add_lora(network, Lora(kind="lora", rank=2, alpha=2, targets=("to_q", "to_v", "net.2"), full_modules=()), seed=3)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if ".lora_B." in name:
                weight.normal_(generator=draw)


CASES = {
    "times per frame": Case(),
    "odd number of tokens": Case({"hidden_states": _draw(3, 3, 4, 6, 10)}),
    "times per sample": Case({"timestep": torch.tensor([900.0, 5.0, 40.0]), "r_timestep": torch.zeros(3)}),
    "one time": Case({"timestep": torch.tensor(900.0), "r_timestep": torch.tensor(300.0)}),
    "checkpointing": Case(prepare=AnyFlowTransformer3DModel.enable_gradient_checkpointing),
    "adapters": Case(prepare=_adapt),
    "no gradient": Case(around=torch.no_grad),
    "bf16 autocast": Case(around=lambda: torch.autocast("cpu", torch.bfloat16)),
}


def run(case: Case, group: Any) -> dict[str, Tensor]:
    """The `output` of a case, the number of `tokens` that the first block saw, and where there is a gradient that of
    the mean square of the output by the `latents` and by each parameter, under its name."""
    network = small(num_attention_heads=4, **case.config)
    case.prepare(network)
    network.split_sequence(group)
    seen: list[int] = []
    network.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))
    arguments = inputs() | case.changes
    latents = arguments["hidden_states"].clone().requires_grad_()
    with case.around():
        output = network(**arguments | {"hidden_states": latents}).sample
    found = {"output": output.detach(), "tokens": torch.tensor(seen[0])}
    if output.requires_grad:
        output.float().square().mean().backward()
        weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        found |= {name: tensor.grad for name, tensor in (weights | {"latents": latents}).items()}
    return found


def refusals(group: Any, only_first: Any) -> dict[str, str]:
    """Messages of calls that must be refused, on all processes, so that none waits for another."""
    network = small(num_attention_heads=4)
    network.split_sequence(group)
    tiny = inputs() | {"hidden_states": torch.zeros(3, 3, 4, 2, 2)}
    return {
        "heads": _message(lambda: small(num_attention_heads=3).split_sequence(group)),
        "positions": _message(lambda: network(**tiny)),
        "member": _message(lambda: small().split_sequence(only_first)),
    }


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "accepted"


def main(rank: int, folder: Path) -> None:
    """Be one of two processes that run all cases.

    Each writes everything that `run` returns to `folder/RANK.safetensors`, under "case/name", and the messages of the
    calls that must be refused to `folder/RANK.json`.
    """
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=240))
    group, only_first = dist.new_group([0, 1]), dist.new_group([0])
    found = {f"{name}/{key}": value for name, case in CASES.items() for key, value in run(case, group).items()}
    save_file({key: value.contiguous() for key, value in found.items()}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(refusals(group, only_first)))
    dist.destroy_process_group()
