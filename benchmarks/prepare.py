"""Measure how fast clips become shards, compared with encoding one clip at a time with diffusers.

* ours: `anyflow prepare`, which decodes in the background, encodes videos in batches, and each different caption once;
* one by one: for every clip, one call of `AutoencoderKLWan`, one call of the text encoder (padded to the full length,
  as in diffusers' pipeline), and one file. Pixels and captions are the same.

The measured time includes loading the models and writing the files. Both ways alternate, and their results are
compared. Then the parts of ours are measured separately on a few clips. Without `--source` the clips are rendered from
the embedded world of moving shapes.

    python benchmarks/prepare.py --clips 96 --repeats 3 --json prepare.json
    python benchmarks/prepare.py --experiment wan_480p --source CLIPS --device cuda      # Wan's own codec
    python benchmarks/prepare.py --codec PIPELINE --source CLIPS
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import heading, in_turns, medians, write_json
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from anyflow_train.commands.quiet import silence_loading_bars
from anyflow_train.config.commands import PrepareConfig
from anyflow_train.config.compose import compose
from anyflow_train.data.prepare import command as prepare
from anyflow_train.data.prepare.sources import Clip, list_clips
from anyflow_train.data.prepare.texts import encode_texts
from anyflow_train.data.prepare.video import read_clip
from anyflow_train.data.prepare.writing import write_shard
from anyflow_train.data.shards import Sample, ShardSet
from anyflow_train.devices import DTYPES
from anyflow_train.models.codec import Codec, clean_prompt
from anyflow_train.tiny.clips import write_clips

PART_CLIPS = 8  # clips whose pixels are in memory at once: 3 GiB at 81 frames of 480x832
Cost = dict[str, float]


def main() -> None:
    options = parse()
    silence_loading_bars()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        config = configure(options, folder)
        clips = list_clips(config.source or "").clips
        ways = {"ours": partial(ours, config), "one by one": partial(one_by_one, config, clips, folder / "plain")}
        calls = {name: partial(cost, way, len(clips)) for name, way in ways.items()}
        found = {name: medians(rows) for name, rows in in_turns(calls, options.repeats).items()}
        differences = compare(Path(config.out), clips, folder / "plain")
        parts = measure_parts(config, clips, folder / "parts")
    show(options, config, len(clips), found, differences, parts)
    facts = {name: getattr(options, name) for name in ("experiment", "repeats", "codec", "source")}
    sizes = {"clips": len(clips), "frames": config.frames, "height": config.height, "width": config.width}
    record = {**facts, **sizes, "ways": found, "ratios": ratios(found), "differences": differences, "parts": parts}
    write_json(options.json, options.device, record)


def configure(options: argparse.Namespace, folder: Path) -> PrepareConfig:
    """Compose the command's config. Without `--source`, clips of the embedded world are rendered."""
    source = options.source
    if source is None:
        source = folder / "clips"
        write_clips(source, options.clips, seed=0)
    given = {"source": source, "out": folder / "shards", "codec": options.codec, "device": options.device}
    overrides = [f"{key}='{value}'" for key, value in given.items() if value is not None]
    return compose("prepare", [f"experiment={options.experiment}", *overrides])


def cost(way: Callable[[], None], clips: int) -> Cost:
    """Measure a call: clips per second, and CPU seconds per clip."""
    start, processor = time.perf_counter(), time.process_time()
    way()
    seconds, spent = time.perf_counter() - start, time.process_time() - processor
    return {"clips_per_second": clips / seconds, "processor_seconds_per_clip": spent / clips}


def ours(config: PrepareConfig) -> None:
    """Run the command with an empty output folder."""
    shutil.rmtree(config.out, ignore_errors=True)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        prepare.run(config)


@torch.no_grad()
def one_by_one(config: PrepareConfig, clips: tuple[Clip, ...], folder: Path) -> None:
    """Encode one clip at a time into one file `NUMBER.safetensors` per clip."""
    folder.mkdir(exist_ok=True)
    device, vae_dtype = torch.device(config.device), DTYPES[config.vae_precision]
    text_dtype = DTYPES[config.precision]
    tokenizer: Any = AutoTokenizer.from_pretrained(config.codec, subfolder="tokenizer", trust_remote_code=False)
    encoder: Any = UMT5EncoderModel.from_pretrained(config.codec, subfolder="text_encoder", dtype=text_dtype)
    vae: Any = AutoencoderKLWan.from_pretrained(config.codec, subfolder="vae", torch_dtype=vae_dtype)
    encoder, vae = encoder.to(device).eval(), vae.to(device).eval()
    mean, std = (torch.tensor(vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    for number, clip in enumerate(clips):
        video = pixels(config, clip)[None].to(device, vae_dtype)
        latents = (vae.encode(video).latent_dist.mode()[0].float().cpu() - mean) / std
        tokens = tokenizer(
            clean_prompt(clip.read_captions()[0]),
            padding="max_length",
            max_length=config.max_text_length,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        text = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0, : int(tokens.attention_mask.sum())]
        tensors = {"latents": latents.transpose(0, 1).contiguous(), "text": text.cpu().contiguous()}
        save_file(tensors, folder / f"{number}.safetensors")


def pixels(config: PrepareConfig, clip: Clip) -> Tensor:
    """Decode a clip, (3, F, H, W) in [-1, 1]."""
    assert clip.video is not None
    return read_clip(clip.video.seekable(), config.frames, config.height, config.width, config.fps)


def compare(out: Path, clips: tuple[Clip, ...], folder: Path) -> dict[str, float]:
    """Largest absolute differences between the results of both ways. Latents have variance 1."""
    shards = ShardSet.open(str(out))
    found = {"latents": 0.0, "text": 0.0}
    for number in range(len(clips)):
        sample, plain = shards.read(number), load_file(folder / f"{number}.safetensors")
        for name, tensor in (("latents", sample.latents), ("text", sample.text)):
            assert tensor is not None
            found[name] = max(found[name], float((tensor.float() - plain[name].float()).abs().max()))
    return found


def measure_parts(config: PrepareConfig, clips: tuple[Clip, ...], folder: Path) -> dict[str, Cost]:
    """Measure each part of ours separately, with models that are already loaded."""
    folder.mkdir()
    device = torch.device(config.device)
    texts = Codec.load(config.codec, device, DTYPES[config.precision])
    videos = Codec.load(config.codec, device, DTYPES[config.vae_precision])
    captions, few = [clip.read_captions()[0] for clip in clips], clips[:PART_CLIPS]
    different = list(dict.fromkeys(captions))
    encode_texts(texts, different[:1], config.max_text_length)  # loads the text encoder
    made: dict[str, Any] = {}

    def decode() -> None:
        made["videos"] = [pixels(config, clip) for clip in few]

    def encode() -> None:
        parts = torch.stack(made["videos"]).split(config.batch)
        made["latents"] = torch.cat([videos.encode_video(part).cpu() for part in parts])

    def text() -> None:
        made["text"] = dict(zip(different, encode_texts(texts, different, config.max_text_length), strict=True))

    def write() -> None:
        rows = zip(few, made["latents"], captions, strict=False)
        write_shard(folder, "part.tar", [Sample(clip.key, x, made["text"][c], c) for clip, x, c in rows])

    return {
        "decode": cost(decode, len(few)),
        "VAE": cost(encode, len(few)),
        "text": cost(text, len(clips)),
        "write": cost(write, len(few)),
    }


def ratios(found: dict[str, Cost]) -> dict[str, float]:
    """Ratios of speed and of CPU seconds, above 1 if ours is faster."""
    ours, plain = found["ours"], found["one by one"]
    return {
        "wall": ours["clips_per_second"] / plain["clips_per_second"],
        "processor": plain["processor_seconds_per_clip"] / ours["processor_seconds_per_clip"],
    }


def show(
    options: argparse.Namespace,
    config: PrepareConfig,
    clips: int,
    found: dict[str, Cost],
    differences: dict[str, float],
    parts: dict[str, Cost],
) -> None:
    """Print the tables."""
    print(heading(options.device, f"{torch.get_num_threads()} torch threads", f"load {os.getloadavg()[0]:.1f}"))
    size = f"{config.frames} frames {config.height}x{config.width}"
    print(f"{clips} clips of {size}, {Path(config.codec).name}, batch {config.batch}")
    print(f"{'':14s}{'clips/s':>10s}{'CPU s/clip':>18s}")
    for name, figures in [*found.items(), *((f"  {part}", figures) for part, figures in parts.items())]:
        print(f"{name:14s}{figures['clips_per_second']:10.2f}{figures['processor_seconds_per_clip']:18.4f}")
    factor = ratios(found)
    print(f"ours is {factor['wall']:.2f}x as fast, and takes 1/{factor['processor']:.2f} of the CPU seconds")
    print(f"largest differences: latents {differences['latents']:.1e}, texts {differences['text']:.1e}")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="tiny_prepare", help="experiment of `anyflow prepare`")
    parser.add_argument("--codec", default=None, help="pipeline folder or hub id; default: the experiment's")
    parser.add_argument("--source", default=None, help="clips with captions, all of which are used")
    parser.add_argument("--clips", type=int, default=96, help="clips of the embedded world, without --source")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 keeps torch's default")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each way, after one warm-up")
    parser.add_argument("--folder", type=Path, default=None, help="folder to write to; default: temporary")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
