"""The noise that clips start from, and texts that do not depend on their neighbours."""

from pathlib import Path

import torch

from anyflow_train.evaluation.clip_maker import ClipRequest, clip_shape, encode_texts
from anyflow_train.evaluation.load import load_model
from anyflow_train.models.codec import Codec
from tests.export.runs import FULL, TINY_WAN, make_run


def test_noise_does_not_depend_on_anything_but_the_seed_and_the_size(tmp_path: Path):
    model = load_model(str(make_run(tmp_path, FULL)), "ema")
    shape = clip_shape(ClipRequest(None, None, None, None), model, Codec.load(TINY_WAN, "cpu"))
    noise = shape.noise(3)
    assert noise.shape == (1, *shape.latent) == (1, 2, 16, 4, 4)
    assert torch.equal(noise, shape.noise(3))
    assert not torch.equal(noise, shape.noise(4))


def test_an_embedding_is_the_same_bits_whatever_stands_beside_it():
    # A longer neighbour would pad the text and change the rounding of its sums.
    texts = ["a red ball", "a blue square moving up, " * 9]
    alone, beside = (encode_texts(str(TINY_WAN), texts[:count], 512, torch.device("cpu"), None) for count in (1, 2))
    assert torch.equal(alone[0], beside[0])
