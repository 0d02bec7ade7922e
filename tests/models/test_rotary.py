import torch
from diffusers.models.transformers.transformer_anyflow import AnyFlowRotaryPosEmbed, apply_rotary_emb
from diffusers.models.transformers.transformer_anyflow_far import AnyFlowCausalRotaryPosEmbed

from anyflow_train.models.rotary import RotaryGrid, Stretch, rotate, rotation_table

CPU = torch.device("cpu")


def test_rotation_is_that_of_diffusers():
    x = torch.randn(2, 3 * 4 * 5, 2, 16, generator=torch.Generator().manual_seed(0))
    layout = {"total_frames": 3, "full_frame_shape": (4, 5)}
    frequencies = AnyFlowRotaryPosEmbed(16, (1, 2, 2), 32)(layout, CPU)["query"]
    expected = apply_rotary_emb(x.transpose(1, 2), frequencies).transpose(1, 2)
    # Angles are float64 on both sides; our product is float32, the reference is complex128.
    torch.testing.assert_close(rotate(x, rotation_table(16, (3, 4, 5), CPU)), expected, rtol=0, atol=1e-6)


def test_the_table_of_context_and_later_frames_is_that_of_diffusers():
    layout = {"total_frames": 5, "num_compressed_frames": 2}
    layout |= {"full_frame_shape": (4, 6), "compressed_frame_shape": (2, 3)}
    complex_numbers = AnyFlowCausalRotaryPosEmbed(16, (1, 2, 2), (1, 4, 4), 32)(layout, CPU)["query"][0, 0]
    stretches = (Stretch((2, 2, 3), 0, 2), Stretch((3, 4, 6), 2))
    found = RotaryGrid(16)(stretches, CPU)
    # Both are float64 before they are rounded here.
    torch.testing.assert_close(found, torch.view_as_real(complex_numbers).float(), rtol=0, atol=1e-6)


def test_a_token_that_covers_positions_lies_in_their_middle():
    """This is exact for two positions: the mean of two unit numbers has the mean angle."""
    pooled = rotation_table(12, (1, 1, 4), CPU, pool=2)
    single = rotation_table(12, (1, 1, 8), CPU)
    between = rotate(single[1::2].flatten(1)[None, :, None], single[0::2])[0, :, 0]  # the sum of the two angles
    twice = rotate(pooled.flatten(1)[None, :, None], pooled)[0, :, 0]
    torch.testing.assert_close(twice[:, -4:], between[:, -4:], rtol=0, atol=1e-6)  # the column's pairs come last


def test_compiled_rotation_is_the_eager_one():
    x = torch.randn(2, 24, 2, 12, generator=torch.Generator().manual_seed(0))
    grid = RotaryGrid(12)

    def turn(x):
        return rotate(x, grid((Stretch((2, 3, 4)),), x.device))

    compiled = torch.compile(turn, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), turn(x), rtol=0, atol=1e-6)


def test_attention_scores_depend_on_distance_only():
    """Attention only depends on relative positions: moving query and key together does not change it."""
    table = rotation_table(12, (1, 1, 9), CPU)
    query, key = torch.randn(2, 1, 1, 1, 12, generator=torch.Generator().manual_seed(0)).expand(2, 1, 9, 1, 12)
    scores = torch.einsum("bqhd,bkhd->qk", rotate(query, table), rotate(key, table))
    for offset in range(-4, 5):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)


def test_a_table_is_computed_once_per_grid():
    grid = RotaryGrid(12)
    first = grid((Stretch((2, 3, 4)),), CPU)
    assert grid((Stretch((2, 3, 4)),), CPU) is first
    assert grid((Stretch((2, 4, 3)),), CPU) is not first


def test_a_table_first_seen_in_inference_mode_can_be_trained_with():
    grid = RotaryGrid(12)
    with torch.inference_mode():
        grid((Stretch((1, 2, 2)),), CPU)
    x = torch.randn(1, 4, 1, 12, requires_grad=True)
    rotate(x, grid((Stretch((1, 2, 2)),), CPU)).sum().backward()
    assert x.grad is not None


def test_an_analysis_with_fake_tensors_leaves_nothing_behind():
    grid = RotaryGrid(12)
    with torch._subclasses.FakeTensorMode():
        grid((Stretch((1, 2, 2)),), CPU)
    assert type(grid((Stretch((1, 2, 2)),), CPU)) is torch.Tensor


def test_many_grids_do_not_pile_up():
    grid = RotaryGrid(12)
    for width in range(1, 140):
        grid((Stretch((1, 1, width)),), CPU)
    assert len(grid._tables) <= 64
