"""One sample on several processes: each holds a part of the tokens, and in self-attention all tokens of a few heads.

The method is that of DeepSpeed-Ulysses (arXiv 2309.14509): an all-to-all before self-attention and one after it. All
else in a block works on single tokens. Only the collective is torch's: diffusers' layer for uneven parts has no
backward pass, DeepSpeed's would bring DeepSpeed here, and torch's own differentiable collectives are deprecated or
private.

The cut is through the positions of a frame, so that every process has a part of each frame: what differs between
frames, such as their times, stays one row per frame. The parts need not be equal, because an all-to-all may send
unequal parts: exact for every size, with neither padding nor mask. Between the two exchanges the tokens stand in the
order of the processes, which attention does not see.
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
    """The processes that work on the same samples, as one of them sees it."""

    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup, heads: int) -> SequenceGroup | None:
        """None for a group of one process, which has all tokens anyway.

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
        """The part of a grid that falls to this process: of every frame the same `positions / size` or one more.

        Raises:
            ValueError: a process would be left without a token.
        """
        if positions < self.size:
            raise ValueError(f"frames of {positions} tokens cannot be split over {self.size} processes")
        share, extra = divmod(positions, self.size)
        return SequencePart(self, frames, tuple(share + (rank < extra) for rank in range(self.size)))


@dataclass(frozen=True)
class SequencePart:
    """A process's part of the tokens of each sample.

    Shapes: S tokens in F frames of P positions, of which s = F * p are this process's; H heads on k processes.

    Attributes:
        positions: p of each process; their sum is P.
    """

    group: SequenceGroup
    frames: int
    positions: tuple[int, ...]

    def take(self, x: Tensor) -> Tensor:
        """(B, S, ...) -> (B, s, ...), a copy. The gradient is that of this process's tokens, zero for all others."""
        return x.unflatten(1, (self.frames, -1))[:, :, self._own].flatten(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """(B, s, C) -> (B, S, C), equal on all processes.

        The gradient goes to this process's own tokens and is not summed over the processes: they all compute the same
        loss from what is gathered here, and each answers for its part of it.
        """
        own = x.unflatten(1, (self.frames, -1)).movedim(2, 0)  # (p, B, F, C)
        rank, size = self.group.rank, self.group.size
        with torch.no_grad():
            sent = own.repeat(size, 1, 1, 1)
            whole = _AllToAll.apply(sent, self.positions, (self.positions[rank],) * size, self.group.group)
        whole = torch.cat((whole[: self._own.start], own, whole[self._own.stop :]))  # own: here with its gradient
        return whole.movedim(0, 2).flatten(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of this process's tokens to all. Three times (B, s, H, head_dim) -> (B, s, D)."""
        return self.all_heads_of_own_tokens(attend(*self.all_tokens_of_some_heads(query, key, value)))

    def all_tokens_of_some_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three times (B, s, H, head_dim) -> (B, S, H / k, head_dim), in one exchange, in the dtype of the values."""
        size = self.group.size
        # Under autocast the norms of queries and keys may give float32, which attention would round: round, then send.
        heads = [x.to(value.dtype).unflatten(2, (size, -1)).permute(2, 1, 0, 3, 4) for x in (query, key, value)]
        sent = torch.stack(heads, dim=2).flatten(0, 1)  # (k s, 3, B, H / k, head_dim)
        received = _AllToAll.apply(sent, self._tokens, self._own_tokens, self.group.group)
        query, key, value = (x.transpose(0, 1) for x in received.unbind(1))
        return query, key, value

    def all_heads_of_own_tokens(self, attended: Tensor) -> Tensor:
        """The way back: (B, S, D / k) -> (B, s, D)."""
        received = _AllToAll.apply(attended.transpose(0, 1), self._own_tokens, self._tokens, self.group.group)
        return received.unflatten(0, (self.group.size, -1)).permute(2, 1, 0, 3).flatten(2)

    @property
    def _own(self) -> slice:
        """This process's positions of a frame."""
        start = sum(self.positions[: self.group.rank])
        return slice(start, start + self.positions[self.group.rank])

    @property
    def _tokens(self) -> tuple[int, ...]:
        return tuple(self.frames * positions for positions in self.positions)

    @property
    def _own_tokens(self) -> tuple[int, ...]:
        """The tokens of this process, once for each process that it trades with."""
        return (self._tokens[self.group.rank],) * self.group.size


class _AllToAll(Function):
    """`torch.distributed.all_to_all_single` with its gradient, which is the same trade the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, receive: tuple[int, ...], send: tuple[int, ...], group: Any) -> Tensor:
        """x: (sum of send, ...), `send[i]` rows for rank i. Returns (sum of receive, ...), `receive[i]` rows from i."""
        ctx.receive, ctx.send, ctx.group = receive, send, group
        received = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(received, x.contiguous(), list(receive), list(send), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grad, ctx.send, ctx.receive, ctx.group), None, None, None
