"""Video to latents and back, and captions to text embeddings, by the VAE and text encoder of a Wan2.1 pipeline."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ftfy
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from anyflow_train.errors import UserError


class Codec:
    """The VAE of a pipeline, and its tokenizer and text encoder, which are loaded when a text is first encoded.

    Attributes:
        source: pipeline folder or hub id.
        vae: frozen AutoencoderKLWan.
        device, dtype: where and in what the VAE and the text encoder compute.
    """

    def __init__(self, source: str, vae: AutoencoderKLWan, device: torch.device, dtype: torch.dtype) -> None:
        self.source = source
        self.vae = vae
        self.device = device
        self.dtype = dtype

    @classmethod
    def load(cls, source: str | Path, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Codec:
        """
        Raises:
            UserError: the source has no VAE of Wan2.1.
        """
        vae = _from_pretrained(AutoencoderKLWan, source, "vae", dtype=dtype)
        return cls(str(source), vae.to(device).eval().requires_grad_(False), torch.device(device), dtype)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent, in height and in width."""
        return self.vae.config["scale_factor_spatial"]

    @property
    def temporal_factor(self) -> int:
        """Video frames per latent frame, but for the first: 4n + 1 frames become n + 1."""
        return self.vae.config["scale_factor_temporal"]

    @property
    def latents_mean(self) -> tuple[float, ...]:
        """Per channel, of the latents as the VAE makes them."""
        return tuple(self.vae.config["latents_mean"])

    @property
    def latents_std(self) -> tuple[float, ...]:
        """Per channel, of the latents as the VAE makes them."""
        return tuple(self.vae.config["latents_std"])

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        """The mode of the posterior, normalised per channel; the same for the same video.

        Args:
            video: (B, 3, 4n + 1, H, W) in [-1, 1], any floating dtype.

        Returns:
            (B, n + 1, C, H / 8, W / 8) float32, mean 0 and variance 1 over natural videos.

        Raises:
            ValueError: a number of frames other than 4n + 1, or a side that 8 does not divide.
        """
        _, _, frames, height, width = video.shape
        if frames % self.temporal_factor != 1:
            raise ValueError(f"a video must have {self.temporal_factor}n + 1 frames, not {frames}")
        if height % self.spatial_factor or width % self.spatial_factor:
            raise ValueError(f"{height} x {width} pixels are no multiples of {self.spatial_factor}")
        posterior = self.vae.encode(video.to(self.device, self.dtype), return_dict=False)[0]
        mean, std = self._statistics()
        return ((posterior.mode().float() - mean) / std).transpose(1, 2).contiguous()

    @torch.no_grad()
    def decode_video(self, latents: Tensor) -> Tensor:
        """(B, n + 1, C, h, w) normalised latents of any floating dtype -> (B, 3, 4n + 1, 8h, 8w) float32 in [-1, 1]."""
        mean, std = self._statistics()
        raw = latents.to(self.device, torch.float32).transpose(1, 2) * std + mean
        return self.vae.decode(raw.to(self.dtype), return_dict=False)[0].float()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], max_length: int = 512) -> list[Tensor]:
        """Embeddings of the valid tokens of each text, as WanPipeline makes them before it pads them with zeros.

        Args:
            texts: captions or prompts; "" is the empty prompt.
            max_length: in tokens; what is longer is cut.

        Returns:
            For each text (tokens, D) in the dtype of the codec, on its device.

        Raises:
            UserError: the source has no tokenizer or text encoder.
        """
        if not texts:
            return []
        # Padding to the longest is enough: the mask hides padding from the valid tokens, and it is cut off.
        batch = self.tokenizer(
            [clean_prompt(text) for text in texts],
            padding="longest",
            max_length=max_length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        hidden = self.text_encoder(batch.input_ids, batch.attention_mask).last_hidden_state.to(self.dtype)
        return [row[:length].clone() for row, length in zip(hidden, batch.attention_mask.sum(1).tolist(), strict=True)]

    @cached_property
    def tokenizer(self) -> Any:
        """The pipeline's tokenizer."""
        return _from_pretrained(AutoTokenizer, self.source, "tokenizer")

    @cached_property
    def text_encoder(self) -> UMT5EncoderModel:
        """The pipeline's text encoder, frozen: with UMT5-XXL 11 GiB in bfloat16, so only loaded where it is used."""
        encoder = _from_pretrained(UMT5EncoderModel, self.source, "text_encoder", dtype=self.dtype)
        return encoder.to(self.device).eval().requires_grad_(False)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        mean, std = torch.tensor([self.latents_mean, self.latents_std], device=self.device).view(2, -1, 1, 1, 1)
        return mean, std


def clean_prompt(text: str) -> str:
    """A prompt as WanPipeline reads it: broken encodings mended, HTML entities resolved, white space made single."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def _from_pretrained(part_class: Any, source: str | Path, part: str, **options: Any) -> Any:
    if Path(source).is_dir() and not (Path(source) / part).is_dir():
        raise UserError(str(source), f"has no folder {part!r}; a Wan2.1 pipeline folder or hub id is wanted")
    try:
        return part_class.from_pretrained(source, subfolder=part, **options)
    except (OSError, ValueError) as error:
        raise UserError(str(source), f"its {part} cannot be loaded: {str(error).splitlines()[0]}") from error
