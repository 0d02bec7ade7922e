"""What a micro-batch's activations take in a forward of a network: those of the eager one on a GPU.

Autocast makes float32 copies of what a norm or the gated sum takes in, so bfloat16 does not halve them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from anyflow_train.config.derived import Derived
from anyflow_train.config.network import Checkpointing, FullTraining, Lora
from anyflow_train.config.on_policy import DistributionMatching
from anyflow_train.config.parameters import matches
from anyflow_train.config.rows import Rows
from anyflow_train.config.run import RunConfig
from anyflow_train.plan.networks import Network
from anyflow_train.plan.states import FLOAT

# Tensors like the latents that the objectives hold at once: x0, z, x_t, velocity, targets, outputs.
LATENT_COPIES = 12
# Texts in float32: what is given, the negative prompt, after dropping, and cast.
TEXT_COPIES = 4


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch's activations on one process, in one forward."""

    config: RunConfig
    derived: Derived
    network: Network
    rows: Rows

    @property
    def unit(self) -> int:
        """Rows of all tokens of a micro-batch on this process."""
        return self._on_process(self.rows.tokens)

    def _on_process(self, tokens: int) -> int:
        return self.config.engine.micro_batch * ceil(tokens / self.derived.sequence_parallel)

    @property
    def half(self) -> bool:
        return self.config.engine.precision == "bf16"

    @property
    def size(self) -> int:
        """Bytes of a number that matrix products take."""
        return 2 if self.half else FLOAT

    @property
    def width(self) -> int:
        return self.network.width

    @property
    def adapted(self) -> bool:
        return isinstance(self.network.adapter, Lora)

    @property
    def block_input(self) -> int:
        """All that gradient checkpointing keeps of a block, if it repeats the whole of it."""
        return self.unit * self.width * self.size

    @property
    def attended(self) -> int:
        """What both attentions of a block give, with the statistics of their softmax."""
        return 2 * self.unit * (self.width * self.size + self.network.architecture.num_attention_heads * FLOAT)

    @property
    def block(self) -> int:
        """What a block keeps for its backward pass."""
        architecture, width, size = self.network.architecture, self.width, self.size
        # x of both modulated norms; q, k, v and the result of self-attention; q and the result of cross-attention
        row = 8 * width * size
        # inputs of norm_q and norm_k, of the second norm_q and of norm2: all float32 under autocast
        row += 4 * width * FLOAT
        row += self._gated * width * FLOAT
        row += architecture.ffn_dim * size  # into GELU
        row += self._linear_inputs * size
        row += 4 * (2 * architecture.num_attention_heads + 9)  # statistics of the norms and of the softmax
        text = self.config.engine.micro_batch * max(self.config.data.text_lengths) * width
        return self.unit * row + self._gathered * width * size + text * (2 * size + FLOAT)

    @property
    def _gathered(self) -> int:
        """Rows of keys and values that are copied for a rectangle of self-attention.

        Both are where they lie in two places. Autocast rounds the keys, which the norm leaves float32, for each anew.
        """
        rows = self.rows
        join_workers = sum(each.keys for each in rows.seen if each.join_workers)
        keys = sum(each.keys for each in rows.seen) - rows.tokens if self.half else join_workers
        return self._on_process(join_workers + keys)

    @property
    def _gated(self) -> int:
        """Results that a gate multiplies, kept where somebody trains the gate."""
        adapter = self.network.adapter
        if isinstance(adapter, FullTraining):
            return 2
        names = ("time_embedder", "delta_embedder", "time_proj")
        trained = (*adapter.targets, *adapter.full_modules)
        return 2 if any(name in target for name in names for target in trained) else 0

    @property
    def _linear_inputs(self) -> int:
        """Numbers per token kept as input of a trained linear layer, beside those that attention keeps anyway."""
        architecture, adapter, width = self.network.architecture, self.network.adapter, self.width
        in_pieces = len(self.rows.seen) > 1  # what several calls of self-attention gave is copied to lie together
        if isinstance(adapter, FullTraining):
            return (3 + in_pieces) * width + architecture.ffn_dim
        numbers, shared = 0, {"attended to text"} if in_pieces else {"attended", "attended to text"}
        for layer, (place, fan_in) in _block_layers(width, architecture.ffn_dim).items():
            if not matches(layer, adapter.targets):
                continue
            numbers += adapter.rank
            # Under autocast peft gives every adapter a copy of its input; in float32 they share it.
            if self.half or place not in shared:
                numbers += fan_in
            shared.add(place)
        return numbers

    def working(self, size: int) -> int:
        """What a block needs for a moment: some tensors of the feed-forward layer, and float32 ones of the residual."""
        wide = self.network.architecture.ffn_dim
        inner = wide * (size + FLOAT + size) if self.adapted and size == 2 else 3 * wide * size
        return self.unit * (inner + 3 * self.width * FLOAT)

    @property
    def graph(self) -> int:
        """What the forward's graph keeps."""
        kept = {"none": self.block, "block": self.block_input, "selective": self.block_input + self.attended}
        return self.network.architecture.num_layers * kept[self._policy] + self.ends

    @property
    def memory(self) -> int:
        """Keys and values of earlier chunks, of all blocks."""
        return (
            self._on_process(self.rows.remembered) * self.network.architecture.num_layers * 2 * self.width * self.size
        )

    @property
    def checkpointing(self) -> bool:
        return self._policy != "none"

    @property
    def _policy(self) -> Checkpointing:
        return self.config.student.gradient_checkpointing

    @property
    def recomputed(self) -> int:
        """What gradient checkpointing brings back of a block, for its backward."""
        return {"none": 0, "block": self.block, "selective": self.block - self.attended}[self._policy]

    def alone(self, size: int) -> int:
        """What a forward without gradient needs for a moment, computing in numbers of `size` bytes."""
        return self.working(size) + self.unit * self.width * 3 * size + self.memory

    @property
    def ends(self) -> int:
        """Rotations, and the last norm and layer."""
        rotation = FLOAT * self.rows.tokens * self.network.architecture.attention_head_dim
        return rotation + 2 * self._on_process(self.rows.velocity) * self.width * self.size

    @property
    def rest(self) -> int:
        """Beside the blocks: the forward's ends, texts, and what the objectives and the loader hold."""
        data = self.config.data
        frames, channels, height, width = self.derived.latent
        latents = FLOAT * frames * channels * height * width
        texts = FLOAT * max(data.text_lengths) * self.network.architecture.text_dim
        batch, steps = self.config.engine.micro_batch, self.derived.accumulation
        given = steps * (batch * (latents + texts) + texts)
        held = batch * (LATENT_COPIES * latents + TEXT_COPIES * texts)
        rollouts = steps * batch * latents if isinstance(self.config.on_policy, DistributionMatching) else 0
        return given + held + rollouts + self.ends


@dataclass(frozen=True)
class Graphs:
    """Forwards with gradient whose graphs are alive together: so many jumps of every part of a clip, in this order."""

    parts: tuple[Activations, ...]
    jumps: int = 1

    @property
    def count(self) -> int:
        return len(self.parts) * self.jumps

    @property
    def largest(self) -> Activations:
        return max(self.parts, key=lambda part: part.block)

    @property
    def kept(self) -> int:
        """By all, beside what is in the `rest` of the largest. What checkpointing repeats reads the memory again."""
        graphs = sum(self.jumps * part.graph + (part.memory if part.checkpointing else 0) for part in self.parts)
        return graphs - self.largest.ends

    @property
    def kept_without_last(self) -> int:
        """Where the backward pass is through with the last of them."""
        return self.kept - self.parts[-1].graph


def _block_layers(width: int, ffn: int) -> dict[str, tuple[str, int]]:
    """The linear layers of a block: what they take in, and how wide that is."""
    return {
        "blocks.0.attn1.to_q": ("normed", width),
        "blocks.0.attn1.to_k": ("normed", width),
        "blocks.0.attn1.to_v": ("normed", width),
        "blocks.0.attn1.to_out.0": ("attended", width),
        "blocks.0.attn2.to_q": ("normed for text", width),
        "blocks.0.attn2.to_out.0": ("attended to text", width),
        "blocks.0.ffn.net.0.proj": ("normed for ffn", width),
        "blocks.0.ffn.net.2": ("inner", ffn),
    }
