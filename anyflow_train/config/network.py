"""Config of the networks: the student, its adapter, and the teacher."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from anyflow_train.config.base import Model

Checkpointing = Literal["none", "block", "selective"]
LORA_TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2")


def _policy(value: Any) -> Any:
    """True and false, as other trainers say it (and runs of before there was a choice)."""
    return ("block" if value else "none") if isinstance(value, bool) else value


class Causal(Model):
    """What `AnyFlowFARTransformer3DModel` takes beside: it generates a clip chunk by chunk.

    chunk_partition: latent frames of every chunk of a clip.
    full_chunk_limit: chunks with full patches in a sequence; older ones are context with larger patches.
    compressed_patch_size: of the context.
    """

    chunk_partition: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 3, 3, 3, 3, 3, 3, 2)
    full_chunk_limit: PositiveInt = 3
    compressed_patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 4, 4)


class Architecture(Model):
    """Shape of the transformer; the names are those of `AnyFlowTransformer3DModel`'s constructor.

    image_dim: always null, for the config of diffusers.
    causal: makes it an `AnyFlowFARTransformer3DModel`; null: all frames are generated together.
    """

    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 2, 2)
    num_attention_heads: PositiveInt = 40
    attention_head_dim: PositiveInt = 128
    in_channels: PositiveInt = 16
    out_channels: PositiveInt = 16
    text_dim: PositiveInt = 4096
    freq_dim: PositiveInt = 256
    ffn_dim: PositiveInt = 13824
    num_layers: PositiveInt = 40
    cross_attn_norm: bool = True
    eps: PositiveFloat = 1e-6
    image_dim: None = None
    rope_max_seq_len: PositiveInt = 1024
    causal: Causal | None = None

    def arguments(self) -> dict[str, Any]:
        """Of the network's constructor, without those of its second time."""
        own = self.model_dump(exclude={"causal"})
        return own if self.causal is None else {**own, **self.causal.model_dump()}


class FullTraining(Model):
    """Every parameter is trained."""

    kind: Literal["full"] = "full"


class Lora(Model):
    """Low-rank adapters on `targets`; `full_modules` are trained whole. Dropout would break finite differences."""

    kind: Literal["lora"]
    rank: PositiveInt = 256
    alpha: PositiveFloat = 256.0
    targets: tuple[str, ...] = LORA_TARGETS
    full_modules: tuple[str, ...] = ()
    dropout: Literal[0] = 0


class Student(Model):
    """The network that is trained.

    init: Wan2.1 transformer or AnyFlow checkpoint (folder or hub id), or a run of ours (its averages, or its adapter
        if this run has the same one); null starts from random weights.
    gradient_checkpointing: what the backward pass computes again: nothing; the blocks; or the blocks but for their
        attentions, whose results are kept (selective). true and false mean block and none.
    time_frequency_limit: only for random weights: fastest time feature left undamped, radians per 1/1000 of time.
    """

    init: str | None = None
    architecture: Architecture
    gate_value: Annotated[float, Field(ge=0, le=1)] = 0.25
    deltatime_type: Literal["r", "t-r"] = "r"
    adapter: Annotated[FullTraining | Lora, Field(discriminator="kind")] = FullTraining()
    gradient_checkpointing: Annotated[Checkpointing, BeforeValidator(_policy)] = "none"
    time_frequency_limit: NonNegativeFloat | None = None


class Teacher(Model):
    """The frozen network, and the pipeline folder (VAE, text encoder, tokenizer) that goes with it.

    source: Wan2.1 pipeline folder or hub id; null for a run that needs no teacher.
    codec: pipeline folder of the VAE and text encoder; null means `source`.
    """

    source: str | None = None
    codec: str | None = None

    @property
    def codec_source(self) -> str | None:
        """Where the VAE, text encoder and tokenizer come from."""
        return self.codec or self.source
