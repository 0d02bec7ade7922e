"""ComfyUI node "AnyFlow any-step": play an any-step student with any number of steps.

Copy this folder into ComfyUI's `custom_nodes`. It only needs torch and safetensors, which ComfyUI has.

The student's network takes two times: the time `t` of its input and the time `r` that a step leads to. Its time
embedding is `(1 - g) E_time(t) + g E_delta(r)`. The exported model contains it at `r = 0`, where ComfyUI's own Wan2.1
network is exact for a single step. For every other step this node adds `g (E_delta(r) - E_delta(0))`. The files
`*.safetensors` in this folder hold the weights of `E_delta`.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn import functional as F

FOLDER = Path(__file__).parent
TIME_SCALE = 1000


class SecondTime:
    """The second time embedder, `r -> g (E_delta(r) - E_delta(0))`, computed in float32.

    Args:
        path: file with the weights of `E_delta` and the gate g in its metadata.
    """

    def __init__(self, path):
        with safe_open(path, framework="pt") as file:
            names = ("0.weight", "0.bias", "2.weight", "2.bias")
            self.weights = [file.get_tensor(f"delta_embedding.{name}").float() for name in names]
            self.gate = float(file.metadata()["gate_value"])

    def __call__(self, r):
        """Return what to add to the time embedding: (B,) float32 in [0, 1] -> (B, D) float32."""
        return self.gate * (self._embed(r) - self._embed(torch.zeros_like(r)))

    def _embed(self, times):
        first, first_bias, second, second_bias = (weight.to(times.device) for weight in self.weights)
        half = first.shape[1] // 2
        frequency = 10000 ** (-torch.arange(half, device=times.device, dtype=torch.float64) / half)
        angles = TIME_SCALE * times.double()[:, None] * frequency
        features = torch.cat([angles.cos(), angles.sin()], dim=1).float()
        return F.linear(F.silu(F.linear(features, first, first_bias)), second, second_bias)


class AnyStep:
    """Wrapper of ComfyUI's calls of the network. The target time of a step is the next of the sampler's sigmas."""

    def __init__(self, network, second_time):
        self.network, self.second_time = network, second_time

    def __call__(self, apply_model, arguments):
        """Call the network with the second time added to its time embedding.

        Args:
            apply_model: ComfyUI's function `(input, timestep, **c)`.
            arguments: mapping with `input`, `timestep` (B,) sigmas in [0, 1], and `c`, whose `transformer_options` hold
                the sampler's `sample_sigmas`.
        """
        t, c = arguments["timestep"], arguments["c"]
        sigmas = c["transformer_options"]["sample_sigmas"].to(t.device).float()
        now = (sigmas[None] - t.float()[:, None]).abs().argmin(1)
        added = self.second_time(sigmas[(now + 1).clamp(max=len(sigmas) - 1)])

        def add(_module, _inputs, output):
            return (output.unflatten(0, (len(added), -1)) + added[:, None].to(output)).flatten(0, 1)

        handle = self.network.time_embedding.register_forward_hook(add)
        try:
            return apply_model(arguments["input"], t, **c)
        finally:
            handle.remove()


class AnyFlowAnyStep:
    """Node that makes a loaded model play any number of steps."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    CATEGORY = "anyflow"

    @classmethod
    def INPUT_TYPES(cls):
        """Inputs of the node: the model, and the name of the file with its second time."""
        return {
            "required": {"model": ("MODEL",), "times": (sorted(path.name for path in FOLDER.glob("*.safetensors")),)}
        }

    def apply(self, model, times):
        """Return a copy of the model that takes the second time into account."""
        student = model.clone()
        wrapper = AnyStep(student.model.diffusion_model, SecondTime(FOLDER / Path(times).name))
        student.set_model_unet_function_wrapper(wrapper)
        return (student,)


NODE_CLASS_MAPPINGS = {"AnyFlowAnyStep": AnyFlowAnyStep}
NODE_DISPLAY_NAME_MAPPINGS = {"AnyFlowAnyStep": "AnyFlow any-step"}
