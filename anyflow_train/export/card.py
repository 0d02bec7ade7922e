"""Model card (README.md) of an export: content, use and origin."""

from __future__ import annotations

from huggingface_hub import ModelCardData

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

_TRANSFORMER = """```python
import torch
from diffusers import {transformer}

transformer = {transformer}.from_pretrained("path/to/this/folder", dtype=torch.{dtype})
```

It samples with `FlowMapEulerDiscreteScheduler(shift={shift})`.
"""

_LORA = """The adapters belong to the Wan2.1 transformer that the run started from. It gets a second time embedder,
which is a copy of the first one:

```python
from diffusers import AnyFlowTransformer3DModel, WanTransformer3DModel

wan = WanTransformer3DModel.from_pretrained("{base}", subfolder="transformer")
names = ("patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim",
         "freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "eps", "image_dim", "rope_max_seq_len")
weights = wan.state_dict()
for name in [name for name in weights if ".time_embedder." in name]:
    weights[name.replace("time_embedder", "delta_embedder")] = weights[name]
transformer = AnyFlowTransformer3DModel(
    **{{name: wan.config[name] for name in names}}, gate_value={gate}, deltatime_type="{deltatime}"
)
transformer.load_state_dict(weights)
transformer.load_lora_adapter("path/to/this/folder", weight_name="pytorch_lora_weights.safetensors")
```

It samples with `FlowMapEulerDiscreteScheduler(shift={shift})`.
"""

_WAN_PIPELINE = """```python
import torch
from diffusers import WanPipeline

pipeline = WanPipeline.from_pretrained("path/to/this/folder", dtype=torch.{dtype})
```
"""

_USES = {"pipeline": _PIPELINE, "transformer": _TRANSFORMER, "lora": _LORA, "wan_pipeline": _WAN_PIPELINE}
_KINDS = {
    "pipeline": "An any-step video diffusion pipeline (AnyFlow, arXiv 2605.13724)",
    "transformer": "The transformer of an any-step video diffusion pipeline (AnyFlow, arXiv 2605.13724)",
    "lora": "LoRA weights of an any-step video diffusion transformer (AnyFlow, arXiv 2605.13724)",
    "wan_pipeline": "A video diffusion pipeline in the layout of Wan2.1",
}
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def model_card(provenance: Provenance) -> str:
    """Make the model card as Markdown, with front matter for the Hugging Face Hub."""
    network, options = provenance.network, provenance.options
    size, training = network.sampling, network.training
    far = "" if network.causal is None else "FAR"
    use = _USES[options.format].format(
        dtype=_DTYPES[options.precision],
        frames=size.frames,
        height=size.height,
        width=size.width,
        shift=options.shift,
        base=provenance.base or "the Wan2.1 pipeline that the run started from",
        gate=network.times["gate_value"],
        deltatime=network.times["deltatime_type"],
        pipeline=f"AnyFlow{far}Pipeline",
        transformer=f"AnyFlow{far}Transformer3DModel",
    )
    facts = [
        f"Trained with anyflow_train {provenance.version}: run `{network.run}`, step {provenance.step}, "
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
    title = f"# {network.run}\n\n{_KINDS[options.format]}."
    return f"---\n{front}\n---\n\n{title}\n\n{use}\n## Origin\n\n{lines}\n"
