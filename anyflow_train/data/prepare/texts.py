"""First pass of `anyflow prepare`: captions and prompts -> text embeddings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from anyflow_train.data.manifest import TEXT, PromptTexts, write_prompt_texts
from anyflow_train.data.prepare.job import ShardPlan
from anyflow_train.data.prepare.progress import ClipProgress
from anyflow_train.data.prepare.sources import Clip
from anyflow_train.files import atomic_file
from anyflow_train.models.codec import Codec

TEXT_BATCH = 16


@dataclass(frozen=True)
class ShardTexts:
    """The captions of a shard's clips, empty where there is none, and the embedding (L, D) of each different one."""

    captions: tuple[str, ...]
    embeddings: dict[str, Tensor]


def encode_shard_texts(
    codec: Codec, folder: Path, shards: list[ShardPlan], max_length: int, progress: ClipProgress
) -> None:
    """Encode the captions of each shard into a file of its own, each different caption once."""
    for shard in shards:
        captions = [_caption(clip) for clip in shard.clips]
        different = [caption for caption in dict.fromkeys(captions) if caption]
        embeddings = encode_texts(codec, different, max_length)
        tensors = {str(number): embedding for number, embedding in enumerate(embeddings)}
        with atomic_file(folder / shard.text_name) as file:
            file.write(save(tensors, {"captions": json.dumps(captions)}))
        progress.advance(len(shard.clips))


def read_shard_texts(path: Path) -> ShardTexts:
    """What `encode_shard_texts` wrote."""
    with safe_open(path, "pt") as file:
        captions = json.loads(file.metadata()["captions"])
        different = [caption for caption in dict.fromkeys(captions) if caption]
        embeddings = {caption: file.get_tensor(str(number)) for number, caption in enumerate(different)}
    return ShardTexts(tuple(captions), embeddings)


def encode_prompts(codec: Codec, folder: Path, negative: str, validation: tuple[str, ...], max_length: int) -> None:
    """Write the embeddings of the negative prompt and of the validation prompts."""
    first, *others = encode_texts(codec, [negative, *validation], max_length)
    write_prompt_texts(folder / TEXT, PromptTexts(first, tuple(others)))


def encode_texts(codec: Codec, texts: list[str], max_length: int) -> list[Tensor]:
    """(L_i, D) each, on the CPU, in the codec's dtype."""
    found: list[Tensor] = []
    for start in range(0, len(texts), TEXT_BATCH):
        part = codec.encode_text(texts[start : start + TEXT_BATCH], max_length)
        found.extend(text.cpu().contiguous() for text in part)
    return found


def _caption(clip: Clip) -> str:
    try:
        return clip.read_caption()
    except OSError:  # a file that vanished, or may not be read, is no caption: the clip is skipped and named
        return ""
