"""Model card (README.md) of an export: content, use and origin."""

from __future__ import annotations

from huggingface_hub import ModelCardData

from anyflow_train import __version__
from anyflow_train.devices import DTYPES
from anyflow_train.export.provenance import Provenance

_PIPELINE = """```python
import torch
from diffusers import {pipeline}
from diffusers.utils import export_to_video

pipeline = {pipeline}.from_pretrained("path/to/this/folder", dtype=torch.{dtype}).to("cuda")
video = pipeline(
    "a prompt", height={height}, width={width}, num_frames={frames}, num_inference_steps=4, guidance_scale=1.0
).frames[0]
export_to_video(video, "video.mp4", fps=16)
```

`num_inference_steps` is the number of network calls. Any number works: 1, 2, 4, 8, ...
"""

_LOAD = """```python
import torch
from diffusers import {name}

{part} = {name}.from_pretrained("path/to/this/folder", dtype=torch.{dtype})
```
"""

_SAMPLER = """
It samples with `FlowMapEulerDiscreteScheduler(shift={shift})`.
"""

_LORA = """The adapters belong to the Wan2.1 transformer that the run started from. It gets a second time embedder,
which is a copy of the first one:

```python
from diffusers import AnyFlowTransformer3DModel, WanTransformer3DModel

wan = WanTransformer3DModel.from_pretrained("{base}", subfolder="transformer")
weights = wan.state_dict()
for name in [name for name in weights if ".time_embedder." in name]:
    weights[name.replace("time_embedder", "delta_embedder")] = weights[name]
times = {{"gate_value": {gate_value}, "deltatime_type": "{deltatime_type}"}}
transformer = AnyFlowTransformer3DModel.from_config(wan.config, **times)
transformer.load_state_dict(weights)
transformer.load_lora_adapter("path/to/this/folder", weight_name="pytorch_lora_weights.safetensors")
```
"""

_ANY_STEP = "any-step video diffusion {} (AnyFlow, arXiv 2605.13724)"
# Format -> description, and how to load it.
_FORMATS = {
    "pipeline": ("An " + _ANY_STEP.format("pipeline"), _PIPELINE),
    "transformer": ("The transformer of an " + _ANY_STEP.format("pipeline"), _LOAD + _SAMPLER),
    "lora": ("LoRA weights of an " + _ANY_STEP.format("transformer"), _LORA + _SAMPLER),
    "wan_pipeline": ("A video diffusion pipeline in the layout of Wan2.1", _LOAD),
}


def model_card(provenance: Provenance) -> str:
    """Make the model card as Markdown, with front matter for the Hugging Face Hub."""
    network, options = provenance.network, provenance.options
    size, training = network.sampling, network.training
    far = "" if network.causal is None else "FAR"
    kind, use = _FORMATS[options.format]
    use = use.format(
        **size.model_dump(include={"frames", "height", "width"}),
        **network.times,
        dtype=str(DTYPES[options.precision]).removeprefix("torch."),
        shift=options.shift,
        base=provenance.base or "the Wan2.1 pipeline that the run started from",
        pipeline=f"AnyFlow{far}Pipeline",
        name="WanPipeline" if options.format == "wan_pipeline" else f"AnyFlow{far}Transformer3DModel",
        part=options.format.removeprefix("wan_"),
    )
    facts = [
        f"Trained with anyflow_train {__version__}: run `{network.run}`, step {provenance.step}, "
        f"{'averaged' if options.weights == 'ema' else 'raw'} weights, stored in {options.precision}.",
        f"Started from: {provenance.base or 'random weights'}.",
        f"Objective: {training.objective}.",
        f"Trained on {size.frames} frames of {size.width}x{size.height}, global batch {training.global_batch}.",
        f"The outputs of these files in stock diffusers differ from the trained model by {provenance.difference:.1e} "
        "(relative root mean square).",
    ]
    base = provenance.base or ""
    hub_id = base if base.count("/") == 1 else None
    front = ModelCardData(library_name="diffusers", pipeline_tag="text-to-video", base_model=hub_id).to_yaml()
    lines = "\n".join(f"* {fact}" for fact in facts)
    title = f"# {network.run}\n\n{kind}."
    return f"---\n{front}\n---\n\n{title}\n\n{use}\n## Origin\n\n{lines}\n"
