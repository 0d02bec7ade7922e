"""First pass of `anyflow prepare`: captions and prompts -> text embeddings."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from anyflow_train.data.index import Skipped
from anyflow_train.data.manifest import TEXT, PromptTexts, write_prompt_texts
from anyflow_train.data.prepare.job import ShardPlan
from anyflow_train.data.prepare.progress import ClipProgress
from anyflow_train.data.prepare.sources import Clip
from anyflow_train.data.shards import Sample
from anyflow_train.files import atomic_file
from anyflow_train.models.codec import Codec

TEXT_BATCH = 16


def encode_shard_texts(
    codec: Codec, folder: Path, shards: list[ShardPlan], max_length: int, progress: ClipProgress
) -> None:
    """Encode the captions of each shard into its temporary file. Equal captions are encoded once."""
    for shard in shards:
        captions = [_caption(clip) for clip in shard.clips]
        embeddings = encode_texts(codec, _different(captions), max_length)
        tensors = {str(number): embedding for number, embedding in enumerate(embeddings)}
        with atomic_file(folder / shard.text_name) as file:
            file.write(save(tensors, {"captions": json.dumps(captions)}))
        progress.advance(len(shard.clips))


def read_shard_texts(folder: Path, shard: ShardPlan) -> list[Sample | Skipped]:
    """Read the texts that `encode_shard_texts` wrote for the clips of a shard, as samples without latents."""
    with safe_open(folder / shard.text_name, "pt") as file:
        captions = json.loads(file.metadata()["captions"])
        texts = {caption: file.get_tensor(str(number)) for number, caption in enumerate(_different(captions))}
    return [
        Sample(clip.key, None, texts[caption], caption) if caption else Skipped(clip.key, "empty caption")
        for clip, caption in zip(shard.clips, captions, strict=True)
    ]


def encode_prompts(codec: Codec, folder: Path, negative: str, validation: tuple[str, ...], max_length: int) -> None:
    """Write the embeddings of the negative prompt and of the validation prompts."""
    first, *others = encode_texts(codec, [negative, *validation], max_length)
    write_prompt_texts(folder / TEXT, PromptTexts(first, tuple(others)))


def encode_texts(codec: Codec, texts: list[str], max_length: int) -> list[Tensor]:
    """Encode texts in batches. Returns embeddings (L_i, D) on the CPU in the codec's dtype."""
    found: list[Tensor] = []
    for start in range(0, len(texts), TEXT_BATCH):
        part = codec.encode_text(texts[start : start + TEXT_BATCH], max_length)
        found.extend(text.cpu().contiguous() for text in part)
    return found


def _caption(clip: Clip) -> str:
    try:
        return clip.read_caption()
    except OSError:  # an empty caption: the clip is skipped and listed
        return ""


def _different(captions: list[str]) -> list[str]:
    return [caption for caption in dict.fromkeys(captions) if caption]
