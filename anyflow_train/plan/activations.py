"""What a micro-batch's activations take in a network: those of the eager one on a GPU.

Autocast makes float32 copies of what a norm or the gated sum takes in, so bfloat16 does not halve them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from anyflow_train.config.derived import Derived, token_grid
from anyflow_train.config.network import FullTraining, Lora
from anyflow_train.config.on_policy import DistributionMatching
from anyflow_train.config.parameters import matches
from anyflow_train.config.run import RunConfig
from anyflow_train.plan.networks import Network
from anyflow_train.plan.states import FLOAT

# Tensors like the latents that the objectives hold at once: x0, z, x_t, velocity, targets, outputs.
LATENT_COPIES = 12
# Texts in float32: what is given, the negative prompt, after dropping, and cast.
TEXT_COPIES = 4


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch's activations on one process."""

    config: RunConfig
    derived: Derived
    network: Network

    @property
    def tokens(self) -> int:
        """Of a sample, in this network's patches."""
        return prod(token_grid(self.derived.latent, self.network.architecture))

    @property
    def unit(self) -> int:
        """Rows of all tokens of a micro-batch on this process."""
        return self.config.engine.micro_batch * ceil(self.tokens / self.derived.sequence_parallel)

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
        """All that gradient checkpointing keeps of a block."""
        return self.unit * self.width * self.size

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
        return self.unit * row + text * (2 * size + FLOAT)

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
        if isinstance(adapter, FullTraining):
            return 3 * width + architecture.ffn_dim
        numbers, shared = 0, set()
        for layer, (place, fan_in) in _block_layers(width, architecture.ffn_dim).items():
            if not matches(layer, adapter.targets):
                continue
            numbers += adapter.rank
            # Under autocast peft gives every adapter a copy of its input; in float32 they share it.
            if self.half or (place not in shared and place != "attended"):
                numbers += fan_in
            shared.add(place)
        return numbers

    def working(self, size: int) -> int:
        """What a block needs for a moment: some tensors of the feed-forward layer, and float32 ones of the residual."""
        wide = self.network.architecture.ffn_dim
        inner = wide * (size + FLOAT + size) if self.adapted and size == 2 else 3 * wide * size
        return self.unit * (inner + 3 * self.width * FLOAT)

    def kept(self, graphs: int) -> int:
        """By the blocks of so many forwards, and beside them by all but one, which is in `rest`."""
        blocks = self.network.architecture.num_layers * (self.block_input if self.checkpointing else self.block)
        return graphs * blocks + (graphs - 1) * self._ends

    @property
    def checkpointing(self) -> bool:
        return self.config.student.gradient_checkpointing

    @property
    def recomputed(self) -> int:
        """What gradient checkpointing brings back of a block, for its backward."""
        return self.block if self.checkpointing else 0

    def alone(self, size: int) -> int:
        """What a forward without gradient needs for a moment, computing in numbers of `size` bytes."""
        return self.working(size) + self.unit * self.width * 3 * size

    @property
    def _ends(self) -> int:
        """Rotations, and the last norm and layer."""
        rotation = FLOAT * self.tokens * self.network.architecture.attention_head_dim
        return rotation + 2 * self.unit * self.width * self.size

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
        return given + held + rollouts + self._ends


def _block_layers(width: int, ffn: int) -> dict[str, tuple[str, int]]:
    """The linear layers of a block: what they take in, and how wide that is."""
    return {
        "blocks.0.attn1.to_q": ("normed", width),
        "blocks.0.attn1.to_k": ("normed", width),
        "blocks.0.attn1.to_v": ("normed", width),
        "blocks.0.attn1.to_out.0": ("attended", width),
        "blocks.0.attn2.to_q": ("normed for text", width),
        "blocks.0.attn2.to_out.0": ("attended", width),
        "blocks.0.ffn.net.0.proj": ("normed for ffn", width),
        "blocks.0.ffn.net.2": ("inner", ffn),
    }
