"""First pass of `anyflow prepare`: captions and prompts -> text embeddings."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from anyflow_train.data.index import Skipped
from anyflow_train.data.manifest import PromptTexts, write_prompt_texts
from anyflow_train.data.prepare.captions import CaptionError
from anyflow_train.data.prepare.job import ShardPlan
from anyflow_train.data.prepare.progress import ClipProgress
from anyflow_train.data.prepare.sources import Clip
from anyflow_train.data.shards import Sample
from anyflow_train.files import atomic_file
from anyflow_train.models.codec import Codec, clean_prompt

TEXT_BATCH = 16


def encode_shard_texts(
    codec: Codec, folder: Path, shards: list[ShardPlan], max_length: int, progress: ClipProgress
) -> None:
    """Encode the captions of each shard into its temporary file. Equal captions are encoded once."""
    for shard in shards:
        captions = [captions_of(clip) for clip in shard.clips]
        different = _different(captions)
        embeddings = encode_texts(codec, different, max_length)
        long = [text for text, x in zip(different, embeddings, strict=True) if _is_cut(codec, text, len(x), max_length)]
        tensors = {str(number): embedding for number, embedding in enumerate(embeddings)}
        with atomic_file(folder / shard.text_name) as file:
            file.write(save(tensors, {"captions": json.dumps(captions), "cut": json.dumps(long)}))
        progress.advance(len(shard.clips))


def read_shard_texts(folder: Path, shard: ShardPlan) -> list[Sample | Skipped]:
    """Read the texts that `encode_shard_texts` wrote for the clips of a shard, as samples without latents."""
    with safe_open(folder / shard.text_name, "pt") as file:
        captions: list[list[str] | str] = json.loads(file.metadata()["captions"])
        texts = {caption: file.get_tensor(str(number)) for number, caption in enumerate(_different(captions))}
    samples: list[Sample | Skipped] = []
    for clip, found in zip(shard.clips, captions, strict=True):
        if isinstance(found, str):
            samples.append(Skipped(clip.key, found))
        else:
            first, *others = [(texts[caption], caption) for caption in found]
            samples.append(Sample(clip.key, None, *first, tuple(others)))
    return samples


def read_cut(folder: Path, shard: ShardPlan) -> frozenset[str]:
    """Read the keys of those clips of a shard that have a caption of too many tokens."""
    with safe_open(folder / shard.text_name, "pt") as file:
        captions, cut = (json.loads(file.metadata()[name]) for name in ("captions", "cut"))
    return frozenset(clip.key for clip, found in zip(shard.clips, captions, strict=True) if {*cut} & {*found})


def encode_prompts(codec: Codec, path: Path, negative: str, validation: tuple[str, ...], max_length: int) -> None:
    """Write the embeddings of the negative prompt and of the validation prompts into a file."""
    first, *others = encode_texts(codec, [negative, *validation], max_length)
    write_prompt_texts(path, PromptTexts(first, tuple(others)))


def encode_texts(codec: Codec, texts: list[str], max_length: int) -> list[Tensor]:
    """Encode texts in batches. Returns embeddings (L_i, D) on the CPU in the codec's dtype."""
    found: list[Tensor] = []
    for start in range(0, len(texts), TEXT_BATCH):
        part = codec.encode_text(texts[start : start + TEXT_BATCH], max_length)
        found.extend(text.cpu().contiguous() for text in part)
    return found


def captions_of(clip: Clip) -> list[str] | str:
    """Return the captions of a clip, or the reason why there are none."""
    try:
        return list(clip.read_captions()) or "empty caption"
    except OSError as error:
        return f"unreadable caption: {error.strerror or type(error).__name__}"
    except CaptionError as error:
        return str(error)


def _is_cut(codec: Codec, text: str, length: int, max_length: int) -> bool:
    return length == max_length and len(codec.tokenizer(clean_prompt(text)).input_ids) > max_length


def _different(captions: list[list[str] | str]) -> list[str]:
    return list(dict.fromkeys(text for texts in captions if isinstance(texts, list) for text in texts))
