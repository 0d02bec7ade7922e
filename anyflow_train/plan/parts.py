"""Parts of a step, and what a network's forwards and backwards cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from anyflow_train.config.run import RunConfig
from anyflow_train.plan.forwards import Forwards, whole_clip
from anyflow_train.plan.networks import Network
from anyflow_train.plan.products import Products, forward_products

Precision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Part:
    """A part of a step.

    Attributes:
        name: for people.
        samples: of the global batch that it is done for, mean over the steps.
        flops: operations of all of them together, mean over the steps.
        precision: of its matrix products.
        counts: whether it is work of the method, and no recomputation or forward whose result is multiplied by zero.
        share: of the steps, in which it is done.
    """

    name: str
    samples: float
    flops: float
    precision: Precision
    counts: bool = True
    share: float = 1.0

    def in_share(self, share: float) -> Part:
        """The same part, done in a share of the steps."""
        return replace(self, flops=share * self.flops, share=share * self.share)


@dataclass(frozen=True)
class Cost:
    """Operations of one sample in a network: its forwards together, mean over the text lengths that are drawn."""

    config: RunConfig
    network: Network
    forwards: Forwards

    @classmethod
    def whole(cls, config: RunConfig, network: Network) -> Cost:
        """Of a whole clip."""
        return cls(config, network, whole_clip(config, network.architecture))

    @property
    def forward(self) -> float:
        return self._mean(lambda products: products.forward)

    @property
    def backward(self) -> float:
        """Without recomputation, as far as the trained weights."""
        return self._mean(lambda products: products.backward)

    @property
    def backward_through(self) -> float:
        """The same, and on to the latents that went in."""
        return self._mean(lambda products: products.backward, latents_need_gradient=True)

    @property
    def recomputed(self) -> float:
        """By gradient checkpointing, where the run has it."""
        policy = self.config.student.gradient_checkpointing
        return self._mean(lambda products: products.recomputed(policy))

    def _mean(self, quantity: Callable[[Products], int], latents_need_gradient: bool = False) -> float:
        lengths = self.config.data.text_lengths
        by_length = {length: self._sum(quantity, length, latents_need_gradient) for length in set(lengths)}
        return fmean(by_length[length] for length in lengths)

    def _sum(self, quantity: Callable[[Products], int], text: int, latents_need_gradient: bool) -> float:
        network = self.network
        return sum(
            times * quantity(forward_products(network.architecture, network.adapter, rows, text, latents_need_gradient))
            for times, rows in self.forwards
        )
