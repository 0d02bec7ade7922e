import shutil

import diffusers
import pytest
import torch
import transformers

from anyflow_train.errors import UserError
from anyflow_train.models.codec import Codec, clean_prompt
from tests.models.networks import TINY_WAN

PROMPTS = [
    "a red ball moving left",
    "",
    "  narrow&nbsp;&amp;amp; blue\n\tsquare   moving up ",
    "square " * 600,
]


@pytest.fixture(scope="module")
def codec():
    return Codec.load(TINY_WAN, "cpu", torch.float32)


@pytest.fixture(scope="module")
def pipeline():
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_WAN, subfolder="tokenizer")
    encoder = transformers.UMT5EncoderModel.from_pretrained(TINY_WAN, subfolder="text_encoder", dtype=torch.float32)
    vae = diffusers.AutoencoderKLWan.from_pretrained(TINY_WAN, subfolder="vae", dtype=torch.float32)
    return diffusers.WanPipeline(tokenizer, encoder, vae, scheduler=None)


@pytest.mark.parametrize("max_length", [16, 512])
def test_text_is_what_the_pipeline_makes_of_it(codec, pipeline, max_length):
    expected = pipeline._get_t5_prompt_embeds(PROMPTS, max_sequence_length=max_length)
    found = codec.encode_text(PROMPTS, max_length)
    for row, embedding in zip(expected, found, strict=True):
        # The pipeline pads before it encodes, which only changes the order of some sums.
        torch.testing.assert_close(embedding, row[: len(embedding)], rtol=1e-4, atol=1e-5)
        assert not row[len(embedding) :].any()
    assert len(found[1]) >= 1
    assert len(found[3]) == max_length


def test_no_texts_are_no_embeddings(codec):
    assert codec.encode_text([]) == []


@pytest.mark.parametrize("text", ["a &lt;b&gt;  c\n", "schÃ¶n", "x&amp;amp;y", " already clean "])
def test_prompts_are_cleaned_like_the_pipelines(text):
    assert clean_prompt(text) == diffusers.pipelines.wan.pipeline_wan.prompt_clean(text)


def test_latents_are_the_normalised_mode_of_the_posterior(codec, pipeline):
    video = torch.rand(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = pipeline.vae.config
    with torch.no_grad():
        mode = pipeline.vae.encode(video).latent_dist.mode()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    latents = codec.encode_video(video)
    assert latents.shape == (2, 3, 16, 4, 4)
    torch.testing.assert_close(latents, ((mode - mean) / std).transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert torch.equal(codec.encode_video(video), latents)


def test_decoding_is_what_the_pipeline_does_with_its_latents(codec, pipeline):
    latents = torch.randn(1, 2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    config = pipeline.vae.config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        expected = pipeline.vae.decode(latents.transpose(1, 2) / (1 / std) + mean).sample
    video = codec.decode_video(latents)
    assert video.shape == (1, 3, 5, 32, 32)
    torch.testing.assert_close(video, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "message"), [((1, 3, 8, 32, 32), "4n"), ((1, 3, 5, 32, 36), "multiples of 8")])
def test_videos_that_do_not_fit_are_named(codec, shape, message):
    with pytest.raises(ValueError, match=message):
        codec.encode_video(torch.zeros(shape))


def test_video_alone_needs_no_text_encoder(tmp_path):
    shutil.copytree(TINY_WAN / "vae", tmp_path / "vae")
    codec = Codec.load(tmp_path, "cpu", torch.float32)
    assert codec.encode_video(torch.zeros(1, 3, 1, 16, 16)).shape == (1, 1, 16, 2, 2)
    with pytest.raises(UserError, match="tokenizer"):
        codec.encode_text(["a red ball"])


def test_a_source_without_a_vae_is_named(tmp_path):
    with pytest.raises(UserError, match="'vae'"):
        Codec.load(tmp_path, "cpu", torch.float32)


def test_half_precision_gives_float32_latents_and_half_text():
    codec = Codec.load(TINY_WAN, "cpu", torch.bfloat16)
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    latents = codec.encode_video(video)
    assert latents.dtype == torch.float32
    assert codec.decode_video(latents).dtype == torch.float32
    assert codec.encode_text(["a red ball"])[0].dtype == torch.bfloat16


def test_a_name_that_can_be_no_hub_id_is_not_looked_for_there():
    with pytest.raises(UserError, match="nothere: is neither a folder nor a hub id"):
        Codec.load("nothere", "cpu", torch.float32)
