"""Play an exported folder with stock diffusers; nothing of this project is imported.

python launch/play.py FOLDER OUT.gif PROMPT [STEPS]
"""

import sys
from pathlib import Path

import torch
from diffusers import AnyFlowPipeline


def main(folder: str, out: str, prompt: str, steps: int = 4) -> None:
    pipeline = AnyFlowPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    frames = pipeline(
        prompt,
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=generator,
        output_type="pil",
    ).frames[0]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(out, save_all=True, append_images=frames[1:], duration=1000 // 16, loop=0)
    calls = f"{steps} call{'s' * (steps != 1)}"
    print(f"{type(pipeline).__module__}.{type(pipeline).__name__}: {len(frames)} frames in {calls} -> {out}")


if __name__ == "__main__":
    main(*sys.argv[1:4], *(int(steps) for steps in sys.argv[4:5]))
