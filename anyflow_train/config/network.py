"""Config of the networks: the student, its adapter, and the teacher."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from anyflow_train.config.base import Model
from anyflow_train.config.original import is_weights_file

Checkpointing = Literal["none", "block", "selective"]
LORA_TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2")


class Causal(Model):
    """Additional arguments of `AnyFlowFARTransformer3DModel`, which generates a clip chunk by chunk.

    chunk_partition: latent frames of every chunk of a clip.
    full_chunk_limit: chunks with full patches in a sequence; older chunks are context with larger patches.
    compressed_patch_size: patch size (F, H, W) of the context.
    """

    chunk_partition: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 3, 3, 3, 3, 3, 3, 2)
    full_chunk_limit: PositiveInt = 3
    compressed_patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 4, 4)


class Architecture(Model):
    """Shape of the transformer. The names are the arguments of `AnyFlowTransformer3DModel`.

    image_dim: always null; the key is part of diffusers' config.
    causal: if set, the network is an `AnyFlowFARTransformer3DModel`; null generates all frames together.
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
        """Return the arguments of the network's constructor, without those of the second time."""
        own = self.model_dump(exclude={"causal"})
        return own if self.causal is None else {**own, **self.causal.model_dump()}


def plain(value: Any) -> Any:
    """Convert a list to a tuple: JSON stores the tuples of an architecture as lists."""
    return tuple(value) if isinstance(value, list) else value


# Published networks, by the last part of their hub id.
PUBLISHED = {
    "Wan2.1-T2V-1.3B-Diffusers": Architecture(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "Wan2.1-T2V-14B-Diffusers": Architecture(),
}


def published(source: str | None) -> Architecture | None:
    """Return the architecture of a published network by its hub id, or by its folder, which usually has that name too.

    None for all other networks.
    """
    return PUBLISHED.get(source.rstrip("/").rpartition("/")[2]) if source else None


class FullTraining(Model):
    """Every parameter is trained."""

    kind: Literal["full"] = "full"


class Lora(Model):
    """Low-rank adapters on `targets`; `full_modules` are trained in full. Dropout would break finite differences.

    rank: rank of the adapters.
    alpha: scale of the adapters is alpha / rank.
    targets: names of linear layers, or the last parts of their names.
    full_modules: names of modules, or the last parts of their names.
    """

    kind: Literal["lora"]
    rank: PositiveInt = 256
    alpha: PositiveFloat = 256.0
    targets: tuple[str, ...] = LORA_TARGETS
    full_modules: tuple[str, ...] = ()
    dropout: Literal[0] = 0


def is_in(path: str, modules: tuple[str, ...]) -> bool:
    """Whether a parameter or module belongs to one of the modules, given as full paths or their last parts."""
    return any(f".{module}." in f".{path}." for module in modules)


def is_target(path: str, targets: tuple[str, ...]) -> bool:
    """Whether a module is a target of an adapter: equal to one of `targets`, or ending in `.target`."""
    return any(f".{path}".endswith(f".{target}") for target in targets)


class Student(Model):
    """The network that is trained.

    init: Wan2.1 transformer or AnyFlow checkpoint (folder or hub id), one `.safetensors` file with the names of Wan's
        own repository or ComfyUI, or a run directory (its averaged weights, or its adapter if this run has the same
        one); null starts from random weights.
    gradient_checkpointing: what the backward pass recomputes: none; block (every transformer block); or selective (the
        blocks except attention, whose results are stored).
    gate_value: fixed weight of the second time's embedding, in [0, 1]; 0 hides the target time r.
    deltatime_type: second time of the network: r (target time) or t-r (length of the jump).
    time_frequency_limit: fastest time feature that is not damped, in radians per 1/1000 of time; only for random
        weights.
    """

    init: str | None = None
    architecture: Architecture
    gate_value: Annotated[float, Field(ge=0, le=1)] = 0.25
    deltatime_type: Literal["r", "t-r"] = "r"
    adapter: Annotated[FullTraining | Lora, Field(discriminator="kind")] = FullTraining()
    gradient_checkpointing: Checkpointing = "none"
    time_frequency_limit: NonNegativeFloat | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the network's constructor."""
        return self.architecture.arguments() | self.model_dump(include=set(STUDENT_TIMES))


STUDENT_TIMES = {name: Student.model_fields[name].default for name in ("gate_value", "deltatime_type")}
"""How a student takes the second time: arguments of its constructor, with their defaults."""


class Teacher(Model):
    """The frozen teacher network, and the pipeline folder with its VAE, text encoder and tokenizer.

    source: Wan2.1 pipeline folder or hub id, or one `.safetensors` file with the names of Wan's own repository or
        ComfyUI; null for a run without a teacher.
    codec: pipeline folder of the VAE and text encoder; null uses `source`. A file of weights has none.
    """

    source: str | None = None
    codec: str | None = None

    @property
    def codec_source(self) -> str | None:
        """Pipeline folder or hub id of the VAE, text encoder and tokenizer."""
        alone = self.source is not None and is_weights_file(self.source)
        return self.codec or (None if alone else self.source)
