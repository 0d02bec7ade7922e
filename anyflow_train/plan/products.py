"""The matrix products of a network's forward, in its order, and which of their inputs need a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

from anyflow_train.config.network import Architecture, Checkpointing, FullTraining, Lora
from anyflow_train.config.parameters import in_modules, matches, parameter_shapes
from anyflow_train.config.rows import Rectangle, Rows

# Fused attention kernels keep no scores: their backward pass makes 5 products of the size of the forward's 2.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Linear:
    """A linear layer on `rows` rows, with a low-rank adapter where `rank` is not 0.

    trained: the layer's own weight; needs_gradient: its input, when the backward pass comes back to it.
    """

    rows: int
    fan_in: int
    fan_out: int
    rank: int
    trained: bool
    needs_gradient: bool

    @property
    def forward(self) -> int:
        """Operations, where a multiplication and an addition are two."""
        return 2 * self.rows * (self.fan_in * self.fan_out + self._adapter)

    @property
    def backward(self) -> int:
        """Of the gradients of input and weights, as far as somebody needs them."""
        base = (self.needs_gradient + self.trained) * self.fan_in * self.fan_out
        adapter = 2 * self._adapter if self.needs_gradient else self._adapter + self.rank * self.fan_out
        return 2 * self.rows * (base + adapter)

    @property
    def _adapter(self) -> int:
        return self.rank * (self.fan_in + self.fan_out)


@dataclass(frozen=True)
class Scores:
    """Softmax attention of `queries` to `keys` tokens, all heads together `width` wide."""

    queries: int
    keys: int
    width: int
    needs_gradient: bool

    @property
    def forward(self) -> int:
        """Scores and weighted values."""
        return 4 * self.queries * self.keys * self.width

    @property
    def backward(self) -> int:
        """All three gradients, and the scores again."""
        return round(ATTENTION_BACKWARD * self.forward) if self.needs_gradient else 0


@dataclass(frozen=True)
class Products:
    """The products of one sample's forward: of the blocks, which checkpointing may repeat, and of the rest."""

    blocks: tuple[Linear | Scores, ...]
    rest: tuple[Linear | Scores, ...]

    @property
    def forward(self) -> int:
        """Operations of a forward."""
        return sum(product.forward for product in (*self.blocks, *self.rest))

    @property
    def backward(self) -> int:
        """Operations of a backward, without recomputation."""
        return sum(product.backward for product in (*self.blocks, *self.rest))

    def recomputed(self, policy: Checkpointing) -> int:
        """Operations that gradient checkpointing repeats."""
        repeated = {"none": (), "block": (Linear, Scores), "selective": (Linear,)}[policy]
        return sum(product.forward for product in self.blocks if isinstance(product, repeated))


def forward_products(
    architecture: Architecture,
    adapter: FullTraining | Lora,
    rows: Rows,
    text: int,
    latents_need_gradient: bool = False,
) -> Products:
    """Of one sample, attending to `text` text tokens."""
    walk = _Walk(architecture, adapter)
    embedder = "condition_embedder"
    modulated = False
    for which in ("time_embedder", "delta_embedder"):
        inner = walk.linear(f"{embedder}.{which}.linear_1", rows.times, False)
        modulated |= walk.linear(f"{embedder}.{which}.linear_2", rows.times, inner)
    modulation = walk.linear(f"{embedder}.time_proj", rows.times, modulated)
    inner = walk.linear(f"{embedder}.text_embedder.linear_1", text, False)
    context = walk.linear(f"{embedder}.text_embedder.linear_2", text, inner)
    x = walk.linear("patch_embedding", rows.full, latents_need_gradient)
    if rows.context:
        x |= walk.linear("far_patch_embedding", rows.context, latents_need_gradient)
    rest = walk.taken()
    last = architecture.num_layers - 1
    for layer in range(last if rows.velocity == 0 else last + 1):
        x = walk.block(f"blocks.{layer}", rows, text, x, context, modulation)
    blocks = walk.taken()
    if rows.velocity == 0:
        walk.keys_and_values(f"blocks.{last}.attn1", rows.tokens, x or modulation)
    else:
        walk.linear("proj_out", rows.velocity, x or modulated or walk.whole("scale_shift_table"))
    return Products(blocks, rest + walk.taken())


class _Walk:
    """Notes products as a forward comes by them. Its booleans say whether a tensor needs a gradient."""

    def __init__(self, architecture: Architecture, adapter: FullTraining | Lora) -> None:
        self._shapes = parameter_shapes(architecture)
        self._adapter = adapter
        self._width = architecture.num_attention_heads * architecture.attention_head_dim
        self._products: list[Linear | Scores] = []

    def taken(self) -> tuple[Linear | Scores, ...]:
        """The products since the last call."""
        products, self._products = tuple(self._products), []
        return products

    def whole(self, parameter: str) -> bool:
        """Whether a parameter is trained itself."""
        if parameter not in self._shapes:
            return False
        return isinstance(self._adapter, FullTraining) or in_modules(parameter, self._adapter.full_modules)

    def linear(self, name: str, rows: int, needs_gradient: bool) -> bool:
        """Note a layer; whether its output needs a gradient."""
        shape = self._shapes[f"{name}.weight"]
        adapter = self._adapter
        rank = adapter.rank if isinstance(adapter, Lora) and matches(name, adapter.targets) else 0
        trained = self.whole(f"{name}.weight")
        self._products.append(Linear(rows, math.prod(shape[1:]), shape[0], rank, trained, needs_gradient))
        return needs_gradient or trained or rank > 0

    def keys_and_values(self, name: str, rows: int, context: bool) -> bool:
        """Note the layers of what is attended to; whether their outputs need a gradient."""
        key, value = (self.linear(f"{name}.{layer}", rows, context) for layer in ("to_k", "to_v"))
        return key or value or self.whole(f"{name}.norm_k.weight")

    def attention(self, name: str, seen: tuple[Rectangle, ...], keys: int, x: bool, context: bool) -> bool:
        """Note an attention with its four layers, `keys` of them; whether its output needs a gradient."""
        queries = sum(each.queries for each in seen)
        query = self.linear(f"{name}.to_q", queries, x) or self.whole(f"{name}.norm_q.weight")
        attended = self.keys_and_values(name, keys, context) or query
        self._products += [Scores(each.queries, each.keys, self._width, attended) for each in seen]
        return self.linear(f"{name}.to_out.0", queries, attended)

    def block(self, name: str, rows: Rows, text: int, x: bool, context: bool, modulation: bool) -> bool:
        """Note a block; whether its output needs a gradient."""
        tokens = rows.tokens
        modulation |= self.whole(f"{name}.scale_shift_table")
        normed = x or modulation
        x = self.attention(f"{name}.attn1", rows.seen, tokens, normed, normed) or normed
        to_text = (Rectangle(tokens, text),)
        x |= self.attention(f"{name}.attn2", to_text, text, x or self.whole(f"{name}.norm2.weight"), context)
        inner = self.linear(f"{name}.ffn.net.0.proj", tokens, x)
        return self.linear(f"{name}.ffn.net.2", tokens, inner) or x
