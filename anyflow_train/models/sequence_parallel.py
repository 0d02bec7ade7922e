"""Sequence parallelism: each process holds some tokens of a sample, and in self-attention all tokens of some heads.

The method is DeepSpeed-Ulysses (arXiv 2309.14509): one all-to-all before self-attention and one after it. The other
layers of a block work on single tokens. The exchange is implemented here on torch's collective, because the layer of
diffusers has no backward pass for unequal parts, that of DeepSpeed would require DeepSpeed, and the differentiable
collectives of torch are deprecated or private.

The positions of each frame are split, so that every process has a part of each frame, and modulation keeps one row per
frame. The parts may differ in size, which an all-to-all supports. The result is therefore exact for every size, without
padding or mask. Between the two exchanges, tokens are in the order of the processes, which does not affect attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from anyflow_train.models.attend import attend


@dataclass(frozen=True)
class SequenceGroup:
    """The processes that split the tokens of the same samples.

    Attributes:
        group: process group.
        rank: rank of this process in the group.
        size: number of processes.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup, heads: int) -> SequenceGroup | None:
        """Describe a group; None for a single process, which has all tokens.

        Raises:
            ValueError: the number of processes does not divide the attention heads, or this process is not among them.
        """
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ValueError("this process is not a member of the group that splits the sequence")
        if heads % size:
            raise ValueError(f"{heads} attention heads cannot be split evenly over {size} processes")
        return None if size == 1 else cls(group, rank, size)

    def part(self, frames: int, positions: int) -> SequencePart:
        """Split the positions of a frame: each process has `positions // size` of them, or one more.

        Raises:
            ValueError: fewer positions than processes.
        """
        if positions < self.size:
            raise ValueError(f"frames of {positions} tokens cannot be split over {self.size} processes")
        share, extra = divmod(positions, self.size)
        return SequencePart(self, frames, tuple(share + (rank < extra) for rank in range(self.size)))


@dataclass(frozen=True)
class SequencePart:
    """The part of the tokens of each sample that this process holds.

    Shapes: S tokens in F frames of P positions; this process holds s = F * p tokens; H heads on k processes.

    Attributes:
        group: the processes.
        frames: F.
        positions: p of each process; their sum is P.
    """

    group: SequenceGroup
    frames: int
    positions: tuple[int, ...]

    def take(self, x: Tensor) -> Tensor:
        """Copy the tokens of this process: (B, S, ...) -> (B, s, ...). The gradient is 0 for all other tokens."""
        return x.unflatten(1, (self.frames, -1))[:, :, self._own].flatten(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """Gather the tokens of all processes: (B, s, C) -> (B, S, C), equal on all processes.

        The gradient flows to the tokens of this process and is not summed over processes, because all of them compute
        the same loss.
        """
        own = x.unflatten(1, (self.frames, -1)).movedim(2, 0)  # (p, B, F, C)
        rank, size = self.group.rank, self.group.size
        with torch.no_grad():
            sent = own.repeat(size, 1, 1, 1)
            whole = _AllToAll.apply(sent, self.positions, (self.positions[rank],) * size, self.group.group)
        whole = torch.cat((whole[: self._own.start], own, whole[self._own.stop :]))  # `own` carries its gradient
        return whole.movedim(0, 2).flatten(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from the tokens of this process to all tokens. query, key, value: (B, s, H, head_dim) -> (B, s, D)."""
        return self.all_heads_of_own_tokens(attend(*self.all_tokens_of_some_heads(query, key, value)))

    def all_tokens_of_some_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exchange all three (B, s, H, head_dim) -> (B, S, H / k, head_dim) at once, in the dtype of the values."""
        size = self.group.size
        # Under autocast, queries and keys may be float32, which attention would round. Round before sending.
        heads = [x.to(value.dtype).unflatten(2, (size, -1)).permute(2, 1, 0, 3, 4) for x in (query, key, value)]
        sent = torch.stack(heads, dim=2).flatten(0, 1)  # (k s, 3, B, H / k, head_dim)
        received = _AllToAll.apply(sent, self._tokens, self._own_tokens, self.group.group)
        query, key, value = (x.transpose(0, 1) for x in received.unbind(1))
        return query, key, value

    def all_heads_of_own_tokens(self, attended: Tensor) -> Tensor:
        """Exchange back: (B, S, D / k) -> (B, s, D)."""
        received = _AllToAll.apply(attended.transpose(0, 1), self._own_tokens, self._tokens, self.group.group)
        return received.unflatten(0, (self.group.size, -1)).permute(2, 1, 0, 3).flatten(2)

    @property
    def _own(self) -> slice:
        """Positions of a frame that this process holds."""
        start = sum(self.positions[: self.group.rank])
        return slice(start, start + self.positions[self.group.rank])

    @property
    def _tokens(self) -> tuple[int, ...]:
        """Number of tokens of each process."""
        return tuple(self.frames * positions for positions in self.positions)

    @property
    def _own_tokens(self) -> tuple[int, ...]:
        """Number of tokens of this process, repeated for each process of the group."""
        return (self._tokens[self.group.rank],) * self.group.size


class _AllToAll(Function):
    """Differentiable `torch.distributed.all_to_all_single`. The gradient is the reverse exchange."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, receive: tuple[int, ...], send: tuple[int, ...], group: Any) -> Tensor:
        """Send `send[i]` rows of x to rank i. Returns (sum of receive, ...), with `receive[i]` rows from rank i."""
        ctx.receive, ctx.send, ctx.group = receive, send, group
        received = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(received, x.contiguous(), list(receive), list(send), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grad, ctx.send, ctx.receive, ctx.group), None, None, None
