"""VAE and text encoder of a Wan2.1 pipeline: video to latents and back, and captions to text embeddings."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import ftfy
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanRMS_norm
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5EncoderModel

from anyflow_train.errors import UserError, reason_of
from anyflow_train.models.weight_files import check_finite, component_files, open_weights


@dataclass(eq=False)
class Codec:
    """VAE, tokenizer and text encoder of a pipeline. The last two are loaded when a text is first encoded.

    Example:
        codec = Codec.load("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "cuda", torch.bfloat16)
        latents = codec.encode_video(video)  # (1, 3, 81, 480, 832) -> (1, 21, 16, 60, 104)

    Attributes:
        source: pipeline folder or hub id.
        vae: frozen AutoencoderKLWan.
        device: device of the VAE and the text encoder.
        dtype: dtype of the VAE and the text encoder.
        spatial_factor: pixels per latent, in height and in width (8 for Wan2.1).
        temporal_factor: video frames per latent frame, except for the first (4 for Wan2.1: 4n + 1 frames become n + 1).
        latents_mean, latents_std: mean and standard deviation per channel of the latents before normalisation.
    """

    source: str
    vae: AutoencoderKLWan
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        config: Any = self.vae.config
        self.spatial_factor: int = config["scale_factor_spatial"]
        self.temporal_factor: int = config["scale_factor_temporal"]
        self.latents_mean: tuple[float, ...] = tuple(config["latents_mean"])
        self.latents_std: tuple[float, ...] = tuple(config["latents_std"])

    @classmethod
    def load(cls, source: str | Path, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Codec:
        """Load the VAE of a pipeline.

        Args:
            source: pipeline folder or hub id.
            device: device of the VAE and the text encoder.
            dtype: dtype of the VAE and the text encoder.

        Raises:
            UserError: the source has no VAE of Wan2.1.
        """
        source = folder if (folder := Path(source).expanduser()).is_dir() else source
        vae = _load_weights(AutoencoderKLWan, source, "vae", dtype)
        for module in vae.modules():
            if isinstance(module, WanRMS_norm):
                module.__class__ = _ChannelNorm
        return cls(str(source), vae.to(device).eval().requires_grad_(False), torch.device(device), dtype)

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        """Encode a video as the mode of the posterior, normalised per channel.

        Args:
            video: (B, 3, 4n + 1, H, W) in [-1, 1], any floating dtype.

        Returns:
            (B, n + 1, C, H / 8, W / 8) float32, mean 0 and variance 1 over natural videos.

        Raises:
            ValueError: the number of frames is not 4n + 1, or height or width is not a multiple of 8.
        """
        _, _, frames, height, width = video.shape
        if frames % self.temporal_factor != 1:
            raise ValueError(f"a video must have {self.temporal_factor}n + 1 frames, not {frames}")
        if height % self.spatial_factor or width % self.spatial_factor:
            raise ValueError(f"height and width must be multiples of {self.spatial_factor}, not {height} x {width}")
        posterior = self.vae.encode(video.to(self.device, self.dtype), return_dict=False)[0]
        mean, std = self._statistics()
        return ((posterior.mode().float() - mean) / std).transpose(1, 2).contiguous()

    @torch.no_grad()
    def decode_video(self, latents: Tensor) -> Tensor:
        """Decode normalised latents.

        Args:
            latents: (B, n + 1, C, h, w), any floating dtype.

        Returns:
            (B, 3, 4n + 1, 8h, 8w) float32 video in [-1, 1].
        """
        mean, std = self._statistics()
        raw = latents.to(self.device, torch.float32).transpose(1, 2) * std + mean
        return self.vae.decode(raw.to(self.dtype), return_dict=False)[0].float()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], max_length: int = 512) -> list[Tensor]:
        """Encode texts as WanPipeline does, without its padding.

        Args:
            texts: captions or prompts; "" is the empty prompt.
            max_length: maximum number of tokens; longer texts are cut.

        Returns:
            Embeddings (tokens, D) of each text, in the dtype and on the device of the codec.

        Raises:
            UserError: the source has no tokenizer or text encoder.
        """
        if not texts:
            return []
        # Padding to the longest text is enough: the mask hides the padding from valid tokens, and it is cut off below.
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

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Move the VAE to a device inside the block, and back after it."""
        before, vae = self.device, cast(nn.Module, self.vae)  # diffusers' annotation of `to` is wrong
        try:
            self.device = device
            vae.to(device)
            yield
        finally:
            self.device = before
            self.vae.clear_cache()
            vae.to(before)

    @contextmanager
    def tiled(self) -> Iterator[None]:
        """Decode in tiles inside the block, which takes less memory."""
        self.vae.clear_cache()  # left over from a decoding that failed
        self.vae.enable_tiling()
        try:
            yield
        finally:
            self.vae.disable_tiling()

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the pipeline."""
        return _from_pretrained(AutoTokenizer, self.source, "tokenizer", trust_remote_code=False)

    @cached_property
    def text_encoder(self) -> UMT5EncoderModel:
        """Text encoder of the pipeline, frozen. It is loaded on first use: UMT5-XXL takes 11 GiB in bfloat16."""
        encoder = _load_weights(UMT5EncoderModel, self.source, "text_encoder", self.dtype)
        return encoder.to(self.device).eval().requires_grad_(False)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        mean, std = torch.tensor([self.latents_mean, self.latents_std], device=self.device).view(2, -1, 1, 1, 1)
        return mean, std


class _ChannelNorm(WanRMS_norm):
    """diffusers' norm over the channels by a sum of squares. torch's own takes a third of the VAE's time on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        scale = values.square().sum(1, keepdim=True).clamp_min_(1e-24).rsqrt_().mul_(self.scale)
        return (values * scale).to(x.dtype) * self.gamma + self.bias


def clean_prompt(text: str) -> str:
    """Clean a prompt as WanPipeline does: repair encodings, resolve HTML entities, collapse white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def _from_pretrained(part_class: Any, source: str | Path, part: str, **options: Any) -> Any:
    if Path(source).is_dir() and not (Path(source) / part).is_dir():
        raise UserError(str(source), f"has no folder {part!r}; give a Wan2.1 pipeline folder or hub id")
    try:
        folder = source if Path(source).is_dir() else _download(str(source), part)
        return part_class.from_pretrained(folder, subfolder=part, **options)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the files can be wrong in any way
        raise UserError(str(source), f"cannot load the {part}: {reason_of(error)}") from error


def _download(source: str, part: str) -> Path:
    """Return the local snapshot of a hub id, with the files of one part.

    The libraries would ask the hub for optional files too, which fails on a machine without a network.
    """
    if source.count("/") != 1:
        raise UserError(source, "is neither a folder nor a hub id (owner/name)")
    try:
        folder = Path(snapshot_download(source, allow_patterns=[f"{part}/*"]))
    except LocalEntryNotFoundError:
        folder = Path()
    names = [path.name for path in (folder / part).iterdir()] if (folder / part).is_dir() else []
    wanted = "tokenizer.json" if part == "tokenizer" else "config.json"
    if wanted not in names and not (part == "tokenizer" and "spiece.model" in names):
        advice = f"run `hf download {source} --include '{part}/*'` on a machine with a network"
        raise UserError(source, f"{part}/{wanted} is not in the cache, and the hub cannot be reached; {advice}")
    return folder


def _load_weights(part_class: Any, source: str | Path, part: str, dtype: torch.dtype) -> Any:
    """Load a component with weights. Raises UserError if a weight is missing or not finite, or a file is damaged."""
    folder = Path(source) / part
    for path in component_files(folder) if folder.is_dir() else ():
        open_weights(path)
    component, report = _from_pretrained(
        part_class, source, part, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise UserError(str(folder), f"has no weight '{missing[0]}', which its config requires")
    check_finite(component.named_parameters(), folder)
    return component
