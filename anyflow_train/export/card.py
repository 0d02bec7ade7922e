"""Model card (README.md) of an export: content, use, quality and origin. Its Python block runs as it is written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from anyflow_train import __version__
from anyflow_train.config.network import PUBLISHED
from anyflow_train.devices import DTYPES
from anyflow_train.export.provenance import Provenance
from anyflow_train.files import json_lines
from anyflow_train.text import markdown_table
from anyflow_train.training.checkpoints.state import is_run

WAN_LICENSE = "apache-2.0"
"""License of the published Wan2.1 weights, which their derivatives keep."""
HOUSE = "Wan-AI/"

_START = """{install}

```python
import torch
from diffusers import {imports}
from diffusers.utils import export_to_gif

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = {dtype}
"""

_PLAY = """video = pipeline(
    "{prompt}",
    height={height},
    width={width},
    num_frames={frames},
    num_inference_steps={calls},
    guidance_scale={guidance},
    generator=torch.Generator(device).manual_seed(0),
    output_type="pil",
).frames[0]
export_to_gif(video, "video.gif", fps=16)
```

{about_calls}
"""

_PIPELINE = _START + 'pipeline = {pipeline}.from_pretrained("{place}", dtype=dtype).to(device)\n' + _PLAY

_TRANSFORMER = (
    _START
    + """# The VAE, the text encoder and the tokenizer are those of the base model.
transformer = {transformer}.from_pretrained("{place}", dtype=dtype)
base = DiffusionPipeline.from_pretrained("{base}", transformer=None, dtype=dtype)
parts = {{name: base.components[name] for name in ("tokenizer", "text_encoder", "vae")}}
scheduler = FlowMapEulerDiscreteScheduler(shift={shift})
pipeline = {pipeline}(transformer=transformer, scheduler=scheduler, **parts).to(device)
"""
    + _PLAY
)

_LORA = (
    _START
    + """base = WanPipeline.from_pretrained("{base}", dtype=dtype)
# The student has a second time embedder, which starts as a copy of the first one.
weights = base.transformer.state_dict()
for name in [name for name in weights if ".time_embedder." in name]:
    weights[name.replace("time_embedder", "delta_embedder")] = weights[name]
times = {{"gate_value": {gate_value}, "deltatime_type": "{deltatime_type}"}}
transformer = AnyFlowTransformer3DModel.from_config(base.transformer.config, **times).to(dtype)
transformer.load_state_dict(weights)
transformer.load_lora_adapter("{place}", weight_name="pytorch_lora_weights.safetensors")
parts = {{name: base.components[name] for name in ("tokenizer", "text_encoder", "vae")}}
scheduler = FlowMapEulerDiscreteScheduler(shift={shift})
pipeline = AnyFlowPipeline(transformer=transformer, scheduler=scheduler, **parts).to(device)
"""
    + _PLAY
    + """
The base is {base_name}. If it is a run, export it first, and name the folder of its export.

Load the file as above. `load_lora_weights` of a plain `WanPipeline` would leave out the adapters of `delta_embedder`,
because Wan2.1 has no second time, and the clips would be wrong.
"""
)

_COMFYUI = """1. Copy `{run}.safetensors` to `ComfyUI/models/{kind}`.
2. Copy the folder `custom_nodes/anyflow` to `ComfyUI/custom_nodes`, and restart ComfyUI.
3. Load {load}.
   Then add the node "AnyFlow any-step" with `{run}.safetensors`, and "ModelSamplingSD3" with shift {shift:g}.
4. Sample with sampler "euler", scheduler "simple", cfg {guidance:g}, and any number of steps: 1, 2, 4, 8, ...

The text encoder and the VAE are those of Wan2.1. Samplers other than "euler" call the network at times that it was not
trained for. Without the node, the model is right only for a single step.
"""

_ANY_CALLS = "`num_inference_steps` is the number of network calls. Any number works: 1, 2, 4, 8, ..."
_MANY_CALLS = (
    "This model is a teacher: it was trained with flow matching alone, and needs tens of network calls "
    "(`num_inference_steps`)."
)
_LOADERS = (
    'the model with "Load Diffusion Model"',
    'Wan2.1 ({base}) with "Load Diffusion Model" and this file with "LoraLoaderModelOnly" at strength 1',
)
# Format -> what it is, and the code that plays it.
_FORMATS = {
    "pipeline": ("A pipeline of", _PIPELINE),
    "transformer": ("The transformer of", _TRANSFORMER),
    "lora": ("LoRA weights of", _LORA),
    "comfyui": ("For ComfyUI: the network of", _COMFYUI),
    "comfyui_lora": ("For ComfyUI: LoRA weights of", _COMFYUI),
    "wan_pipeline": ("A pipeline, in the layout of Wan2.1, of", _PIPELINE),
}


def model_card(provenance: Provenance, quality: Mapping[str, float]) -> str:
    """Make the model card as Markdown, with front matter for the Hugging Face Hub.

    Args:
        provenance: origin of the export.
        quality: numbers of the run's validation at this checkpoint, from `validated`; empty if there are none.
    """
    kind, use = _FORMATS[provenance.options.format]
    network, any_step = provenance.network, provenance.network.sampling.any_step
    what = "an any-step video diffusion model (AnyFlow, arXiv 2605.13724)" if any_step else "a video diffusion teacher"
    rows = list(_quality_rows(quality))
    parts = [
        f"# {network.run}\n\n{kind} {what}.",
        use.format(**_values(provenance)).rstrip(),
        *(["## Quality by number of network calls", _quality_text(rows)] if rows else []),
        "## Origin",
        "\n".join(f"* {fact}" for fact in _facts(provenance)),
    ]
    card = "---\n" + _front(provenance, rows).to_yaml() + "\n---\n\n" + "\n\n".join(parts) + "\n"
    return str(ModelCard(card))


def hub_id(source: str | None) -> str | None:
    """Return the full hub id of a base model: its own, or that of a published network whose folder has its name."""
    name = (source or "").rstrip("/").rpartition("/")[2]
    if name in PUBLISHED:
        return HOUSE + name
    return (
        source if source and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) and not Path(source).exists() else None
    )


def validated(checkpoint: Path, step: int) -> dict[str, float]:
    """Read the numbers of a run's last validation up to `step`: name without `validation/` -> value."""
    prefix, found = "validation/", dict[str, float]()
    for row in json_lines(checkpoint.parent.parent / "metrics.jsonl"):
        values = {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
        found = values if values and row.get("step", step + 1) <= step else found
    return found


def _values(provenance: Provenance) -> dict[str, object]:
    """Return the values of the code block."""
    network, options, sampling = provenance.network, provenance.options, provenance.network.sampling
    far = "" if network.causal is None else "FAR"
    pipeline = "WanPipeline" if options.format == "wan_pipeline" else f"AnyFlow{far}Pipeline"
    transformer = f"AnyFlow{far}Transformer3DModel"
    extra = " peft" if options.format == "lora" else ""
    imports = {
        "transformer": [transformer, pipeline, "DiffusionPipeline", "FlowMapEulerDiscreteScheduler"],
        "lora": ["AnyFlowPipeline", "AnyFlowTransformer3DModel", "FlowMapEulerDiscreteScheduler", "WanPipeline"],
    }.get(options.format, [pipeline])
    where = "" if options.push else ", and run it in this folder"
    return {
        **network.times,
        "install": f"`pip install torch diffusers transformers accelerate ftfy{extra}`{where}:",
        "imports": ", ".join(sorted(imports)),
        "dtype": _dtype(str(DTYPES[options.precision])),
        "pipeline": pipeline,
        "transformer": transformer,
        "place": options.push or ".",
        "base": _loadable(network.codec if options.format == "transformer" else provenance.source, options.push),
        "base_name": hub_id(provenance.source) or provenance.base,
        "shift": options.shift,
        "prompt": json.dumps(options.prompt, ensure_ascii=False)[1:-1],
        "height": sampling.height or 480,
        "width": sampling.width or 832,
        "frames": sampling.frames or 81,
        "calls": 4 if sampling.any_step else 50,
        # A teacher is as good as it is only with guidance; in a student it is part of the weights.
        "guidance": 1.0 if sampling.any_step else 5.0,
        "run": network.run,
        "kind": "loras" if options.format == "comfyui_lora" else "diffusion_models",
        "load": _LOADERS[options.format == "comfyui_lora"].format(base=hub_id(provenance.source) or provenance.base),
        "about_calls": _ANY_CALLS if sampling.any_step else _MANY_CALLS,
    }


def _dtype(name: str) -> str:
    """Write the expression for a dtype, such as `torch.bfloat16`. A CPU takes float32."""
    return name if name == "torch.float32" else f'{name} if device == "cuda" else torch.float32'


def _loadable(base: str | None, pushed: str | None) -> str:
    """Return what loads the base in diffusers: hub id or folder. A folder is private if the card is published."""
    if known := hub_id(base):
        return known
    return "path/to/the/base" if base is None or pushed or is_run(base) else str(Path(base).expanduser().absolute())


def _facts(provenance: Provenance) -> Iterator[str]:
    network, options = provenance.network, provenance.options
    size, training = network.sampling, network.training
    averaged = "averaged" if options.weights == "ema" else "raw"
    run = f"Trained with anyflow_train {__version__}: run `{network.run}`, step {provenance.step}"
    yield f"{run}, {averaged} weights, stored in {options.precision}."
    yield f"Started from: {hub_id(provenance.source) or provenance.base or 'random weights'}."
    yield f"Objective: {training.objective}."
    yield f"Trained on {size.frames} frames of {size.width}x{size.height}, global batch {training.global_batch}."
    difference = f"differ from the trained model by {provenance.difference:.1e} (relative root mean square)"
    yield f"The outputs of these files {difference}."
    if provenance.lost is not None:
        yield f"The adapters lose {provenance.lost:.1%} of what was trained (root mean square of the weights' change)."


def _front(provenance: Provenance, rows: list[tuple[int, float, float, float]]) -> ModelCardData:
    options, base = provenance.options, hub_id(provenance.source)
    dataset = options.datasets[0] if options.datasets else "held-out"
    results = [
        EvalResult(
            task_type="text-to-video",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type="energy_distance",
            metric_name=f"energy distance, {calls} calls",
            metric_value=round(value, 4),
            metric_args={"calls": calls, "low": round(low, 4), "high": round(high, 4)},
        )
        for calls, value, low, high in rows
    ]
    return ModelCardData(
        license=options.license or (WAN_LICENSE if base and base.startswith(HOUSE) else None),
        library_name="diffusers",
        pipeline_tag="text-to-video",
        base_model=base,
        base_model_relation="adapter" if base and "lora" in options.format else "finetune" if base else None,
        datasets=list(options.datasets) or None,
        tags=["any-step", "flow-map", "wan"] if provenance.network.sampling.any_step else ["wan"],
        model_name=provenance.network.run,
        eval_results=results or None,
    )


def _quality_rows(quality: Mapping[str, float]) -> Iterator[tuple[int, float, float, float]]:
    """Yield number of calls, energy distance and the ends of its interval."""
    for name, value in quality.items():
        if found := re.fullmatch(r"energy_distance_(\d+)", name):
            low, high = (quality.get(f"{name}_{end}", value) for end in ("low", "high"))
            yield int(found[1]), value, low, high


def _quality_text(rows: list[tuple[int, float, float, float]]) -> str:
    table = [[str(calls), f"{value:.3g} [{low:.2g}, {high:.2g}]"] for calls, value, low, high in sorted(rows)]
    lines = markdown_table([["calls", "energy distance to held-out clips"], *table])
    return "\n".join([*lines, "", "Smaller is better; zero means no difference. In latent space, 95 % intervals."])
