"""The word-level tokenizer and the random text encoder."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from anyflow_train.tiny import shapes as world
from world_text import build_text_encoder, build_tokenizer


def test_captions_survive_the_tokenizer(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for caption in world.CAPTIONS:
        tokens = tokenizer(caption).input_ids
        assert tokenizer.unk_token_id not in tokens
        assert tokenizer.decode(tokens) == f"{caption} </s>"
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]


def test_the_encoder_is_a_function_of_its_seed_alone() -> None:
    torch.manual_seed(1)
    one = build_text_encoder(0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two = build_text_encoder(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(next(build_text_encoder(1).parameters()), next(one.parameters()))


def test_all_captions_are_told_apart() -> None:
    captions = list(world.CAPTIONS)
    tokens = build_tokenizer()(captions, return_tensors="pt")
    features = build_text_encoder(0)(tokens.input_ids, tokens.attention_mask).last_hidden_state.flatten(1)
    distance = torch.cdist(features, features) + 1e9 * torch.eye(len(captions))
    # Captions differ in one to three of six words. The nearest pair must differ by a fair share of the vectors' length.
    assert distance.min() > 0.2 * features.norm(dim=1).mean()
