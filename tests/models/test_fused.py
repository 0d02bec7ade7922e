import pytest
import torch
from torch.nn import functional as F

from anyflow_train.models import fused


def plain_modulated(x, shift, scale):
    frames = shift.shape[1]
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6).unflatten(1, (frames, -1))
    return (normed * (1 + scale) + shift).flatten(1, 2)


def plain_rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def plain_gelu(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def ours_modulated(x, shift, scale):
    return fused.modulated_layer_norm(x, shift, scale, 1e-6)[0]


def ours_with_residual(x, shift, scale):
    normed, x = fused.modulated_layer_norm(x, shift, scale, 1e-6)
    return 2 * x + normed


def plain_with_residual(x, shift, scale):
    return 2 * x + plain_modulated(x, shift, scale)


def ours_rms(x, weight):
    return fused.rms_norm(x, weight, 1e-6)


CASES = {
    "layer norm, times per sample": (ours_modulated, plain_modulated, [(2, 6, 8), (2, 1, 1, 8), (2, 1, 1, 8)]),
    "layer norm, times per frame": (ours_modulated, plain_modulated, [(2, 6, 8), (2, 3, 1, 8), (2, 3, 1, 8)]),
    "layer norm, times per token": (ours_modulated, plain_modulated, [(2, 3, 8), (2, 3, 1, 8), (2, 3, 1, 8)]),
    "layer norm, one time": (ours_modulated, plain_modulated, [(2, 6, 8), (1, 1, 1, 8), (1, 1, 1, 8)]),
    "residual and layer norm": (ours_with_residual, plain_with_residual, [(2, 6, 8), (2, 3, 1, 8), (2, 3, 1, 8)]),
    "rms norm": (ours_rms, plain_rms, [(2, 6, 8), (8,)]),
    "gelu": (fused.gelu_tanh, plain_gelu, [(2, 6, 8)]),
}


@pytest.fixture(params=CASES, name="case")
def drawn_case(request):
    ours, plain, shapes = CASES[request.param]
    draw = torch.Generator().manual_seed(0)
    return ours, plain, [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]


def test_value_and_gradients_are_those_of_the_plain_formula(case):
    ours, plain, tensors = case
    exact = [x.detach().double().requires_grad_() for x in tensors]
    result, expected = ours(*tensors), plain(*exact)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((result * weights).sum(), tensors)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), exact)
    # A few float32 roundings of numbers of size one, sums of at most a dozen of them.
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=3e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=1e-5)


def test_forward_mode_derivative_is_that_of_the_plain_formula(case):
    ours, plain, tensors = case
    primals = tuple(x.detach() for x in tensors)
    tangents = tuple(torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) for x in primals)
    result = torch.func.jvp(ours, primals, tangents)[1]
    expected = torch.func.jvp(plain, tuple(x.double() for x in primals), tuple(x.double() for x in tangents))[1]
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)


def test_a_frozen_input_gets_no_gradient(case):
    ours, _, tensors = case
    for frozen in range(len(tensors)):
        chosen = [x.detach().requires_grad_(i != frozen) for i, x in enumerate(tensors)]
        result = ours(*chosen)
        if result.requires_grad:
            result.sum().backward()
        assert [x.grad is None for x in chosen] == [i == frozen for i in range(len(chosen))]


def test_gelu_slope_at_its_special_points():
    """The slope at 0 is 1/2 (0 / 0 in the backward pass), and 0 and 1 for large inputs."""
    x = torch.tensor([0.0, -0.0, -40.0, 40.0], requires_grad=True)
    fused.gelu_tanh(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.5, 0.5, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_of_the_input_is_kept(dtype):
    x = torch.randn(2, 6, 8, dtype=dtype)
    modulation = torch.randn(2, 3, 1, 8)
    assert fused.gelu_tanh(x).dtype == dtype
    assert fused.rms_norm(x, torch.ones(8), 1e-6).dtype == dtype
    assert fused.modulated_layer_norm(x, modulation, modulation, 1e-6)[0].dtype == dtype


def test_layer_norm_keeps_neither_the_normalised_input_nor_an_expanded_modulation():
    kept = []
    x, modulation = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 3, 1, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fused.modulated_layer_norm(x, modulation, modulation, 1e-6)
    sizes = {tensor.data_ptr(): tensor.numel() for tensor in kept}
    tokens = 2 * 6  # each has a mean and an inverse deviation
    assert sorted(sizes.values()) == [tokens, tokens, modulation.numel(), x.numel()]
