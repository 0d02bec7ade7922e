"""Count what is launched on the pretended GPU, and the bytes that it reads and writes."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anyflow_train.models import fused_gpu

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "_scaled_mm", "convolution"}
# Operators that allocate or rename, which the schema does not say.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
ONLY_WRITTEN = {"copy_", "zero_", "fill_"}


def counted(call: Callable[[], Any], folder: Path) -> Counter[str]:
    """Make a call, and count launches of kernels, matrix products, copies and fills; and each kernel by its name."""
    library, file = ctypes.CDLL(os.environ["LD_PRELOAD"]), folder / "launches.txt"
    library.fakegpu_reset()
    call()
    library.fakegpu_dump(str(file).encode())
    found: Counter[str] = Counter()
    for line in file.read_text().splitlines():
        if "\t" in line:
            count, name = line.split("\t", 1)
        else:
            name, count = line.split()
        found[name] += int(count)
    return found


def total(found: Counter[str]) -> int:
    """All that the GPU is given to do."""
    return sum(found[kind] for kind in ("launches", "gemm", "memcpy", "memset"))


class Traffic(TorchDispatchMode):
    """Counts bytes of the tensors that each operator reads and writes, by kind: product, attention, elementwise.

    A tensor counts once per operator, also if the operator has several kernels. What is broadcast counts as it is in
    memory. Compiled code must have been compiled before: torch does not compile within a dispatch mode.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether torch compiles and runs compiled code within the mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        if isinstance(func, HigherOrderOperator):  # around attention, for the state of random numbers
            func, *args = args
        name, returns = func.overloadpacket.__name__, func._schema.returns
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in returns)
        if not views and name not in NO_KERNEL:
            kind = "product" if name in PRODUCTS else "attention" if "attention" in name else "elementwise"
            inputs = (args[1:] if name in ONLY_WRITTEN else args), {k: v for k, v in kwargs.items() if k != "out"}
            self.bytes[kind] += size(tree_leaves(inputs)) + size(tree_leaves(results))
        return results


@contextmanager
def traffic() -> Iterator[Counter[str]]:
    """Count bytes within the context, also those of Triton kernels: ours and the compiler's."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner  # only builds for GPUs have Triton

    launch, run = fused_gpu._launch, CachingAutotuner.run

    def launched(name: str, grid: Any, *tensors: Any, **options: Any) -> None:
        mode.bytes["elementwise"] += size(tensors)
        launch(name, grid, *tensors, **options)

    def ran(self: Any, *tensors: Any, **options: Any) -> Any:
        # The kernel's first arguments are its tensors; sizes and constants follow, which have no entry in `tensors`.
        changed = [tensor for name, tensor in zip(self.fn.arg_names, tensors, strict=False) if "in_out" in name]
        mode.bytes["elementwise"] += size(tensors) + size(changed)
        return run(self, *tensors, **options)

    with ExitStack() as stack:
        stack.enter_context(patch.object(fused_gpu, "_launch", launched))
        stack.enter_context(patch.object(CachingAutotuner, "run", ran))
        stack.enter_context(patch.object(torch._dynamo.config, "inline_torch_dispatch_torch_compile", False))
        mode = stack.enter_context(Traffic())
        yield mode.bytes


def size(values: Iterable[Any]) -> int:
    """Bytes of the tensors on the GPU among some values, each tensor once."""
    known = {(each.data_ptr(), each.shape, each.stride()): each for each in values if isinstance(each, Tensor)}
    return sum(_extent(tensor) for tensor in known.values() if tensor.is_cuda)


def _extent(tensor: Tensor) -> int:
    """Bytes of a tensor in memory: broadcast axes count once."""
    numbers = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= length if stride else min(length, 1)
    return numbers * tensor.element_size()
