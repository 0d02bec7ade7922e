"""Text encoder of the moving shapes: a word-level tokenizer and a random, frozen UMT5 encoder.

Eleven words need no training: random embeddings and random attention already give different outputs for all captions.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from anyflow_train.tiny.shapes import WORDS

WIDTH = 64
LAYERS = 2
# Default length to which Wan's pipeline pads prompts.
LONGEST_PROMPT = 512

_PADDING, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word, in a fixed order, and an end token, as in UMT5's tokenizer."""
    vocabulary = {word: index for index, word in enumerate((_PADDING, _END, _UNKNOWN, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", special_tokens=[(_END, vocabulary[_END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PADDING,
        eos_token=_END,
        unk_token=_UNKNOWN,
        model_max_length=LONGEST_PROMPT,
    )


def build_text_encoder(seed: int) -> UMT5EncoderModel:
    """Build the random, frozen encoder in float32. The weights depend on the seed alone."""
    config = UMT5Config(
        vocab_size=len(build_tokenizer()),
        d_model=WIDTH,
        d_kv=16,
        d_ff=2 * WIDTH,
        num_layers=LAYERS,
        num_heads=4,
        relative_attention_num_buckets=8,
        feed_forward_proj="gated-gelu",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = UMT5EncoderModel(config)
    return encoder.eval().requires_grad_(False)
