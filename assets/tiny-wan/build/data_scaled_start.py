"""Data-scaled initial weights for the tiny codec. With diffusers' default weights it only learns the mean colour."""

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

# The outputs of residual branches (last convolution of a block, projection of the attention) start small, so that every
# block is nearly the identity. The pixels start with the standard deviation of the clips.
_BRANCH_SPREAD = 0.1
_PIXEL_SPREAD = 0.4
_POSTERIOR_LOG_VARIANCE = -6.0


@torch.no_grad()
def initialise(codec: AutoencoderKLWan, video: Tensor) -> None:
    """Make every convolution orthogonal, and centre and scale its output on `video`, in one forward pass.

    This is layer-sequential unit-variance initialisation (Mishkin and Matas, arXiv 1511.06422). The log-variance half
    of the posterior starts at a small constant, so that latents of the first steps are nearly noise-free.

    Args:
        codec: changed in place.
        video: (B, 3, F, H, W) in [-1, 1], representative clips.
    """
    convolutions = [(n, m) for n, m in codec.named_modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    for _, convolution in convolutions:
        nn.init.orthogonal_(convolution.weight)
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
    hooks = [m.register_forward_hook(_Rescale(_spread(name))) for name, m in convolutions]
    try:
        codec.decode(codec.encode(video, return_dict=False)[0].mode())
    finally:
        for hook in hooks:
            hook.remove()
    channels = codec.config["z_dim"]
    assert codec.quant_conv.bias is not None
    codec.quant_conv.weight[channels:] *= 0.1
    codec.quant_conv.bias[channels:] = _POSTERIOR_LOG_VARIANCE


def _spread(name: str) -> float:
    """Return the initial standard deviation of the output of a convolution, given by its name."""
    if name == "decoder.conv_out":
        return _PIXEL_SPREAD
    return _BRANCH_SPREAD if name.endswith(("conv2", "proj")) else 1.0


class _Rescale:
    """Forward hook that centres each output channel, and scales the whole output, at the first call."""

    def __init__(self, spread: float) -> None:
        self.spread = spread
        self.done = False

    def __call__(self, module: nn.Conv2d | nn.Conv3d, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.done:  # the codec calls each convolution once per chunk of frames
            return output
        self.done = True
        over = [0, *range(2, output.dim())]
        mean = output.mean(over)
        scale = self.spread / output.std(over).mean().clamp_min(1e-4)
        module.weight.mul_(scale)
        assert module.bias is not None
        module.bias.copy_(-mean * scale)
        return (output - mean.view(1, -1, *[1] * (output.dim() - 2))) * scale
