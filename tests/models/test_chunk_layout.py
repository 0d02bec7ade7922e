import pytest
import torch
from torch.nn import functional as F

from anyflow_train.models.chunk_layout import ChunkLayout

GRID, POOL = (4, 6), 2  # 24 tokens in a full frame, 6 in one of the context


def layout(partition, full_chunks, copies):
    made = ChunkLayout.of(partition, full_chunks, GRID, POOL)
    return made.with_copies() if copies else made


def kinds(made: ChunkLayout) -> list[tuple[str, int]]:
    """Kind and chunk of each token, derived from the attributes only."""
    older = len(made.context)
    tokens = [("context", chunk) for chunk, frames in enumerate(made.context) for _ in range(6 * frames)]
    tokens += [("clean", older + chunk) for chunk, frames in enumerate(made.copies) for _ in range(24 * frames)]
    return tokens + [("full", older + chunk) for chunk, frames in enumerate(made.full) for _ in range(24 * frames)]


def sees(query: tuple[str, int], key: tuple[str, int], copies: bool) -> bool:
    """Whether one token sees another under the rules of FAR."""
    (kind, chunk), (other, past) = query, key
    if past > chunk or (kind != "full" and other == "full"):
        return False
    if kind == "full" and copies and past == chunk:
        return other == "full"  # a noisy chunk sees itself, not its clean copy
    return not (kind == "full" and other == "full" and copies and past != chunk)


CASES = [((3,), 3, False), ((1, 2), 2, False), ((1, 2), 2, True), ((2, 1, 1, 2), 2, True), ((2, 1, 1, 2), 3, True)]
CASES += [((2, 1, 2), 0, False), ((2, 1, 2), 1, True), ((1, 2, 1), 2, False)]


@pytest.mark.parametrize(("partition", "full_chunks", "copies"), CASES)
def test_segments_are_the_dense_mask(partition, full_chunks, copies):
    """Outputs and gradients of one attention call with a dense mask from the rules."""
    made = layout(partition, full_chunks, copies)
    tokens = kinds(made)
    assert made.tokens == len(tokens)
    assert made.full_tokens == sum(kind == "full" for kind, _ in tokens)
    mask = torch.tensor([[sees(query, key, copies and len(made.full) > 1) for key in tokens] for query in tokens])
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(2, len(tokens), 2, 4, dtype=torch.float64, generator=draw).requires_grad_() for _ in range(3)]
    weights = torch.randn(2, len(tokens), 8, dtype=torch.float64, generator=draw)
    found = made.attention().attend(*given)
    heads_first = [x.transpose(1, 2) for x in given]
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2).flatten(2)
    # float64, same sums in another order
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    gradients = [torch.autograd.grad((output * weights).sum(), given) for output in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_each_chunk_is_one_call():
    made = layout((1, 2, 1), 2, copies=True)
    assert [each.keys for each in made.attention().segments] == [
        ((0, 6),),  # the context, one frame
        ((0, 6 + 48),),  # the copy of the second chunk
        ((0, 6), (54, 102)),  # the second chunk, noisy
        ((0, 54), (102, 126)),  # the third chunk, noisy; it has no copy
    ]
    first, *_ = layout((2, 1), 2, copies=True).attention().segments[1:]
    assert first.keys == ((48, 96),)  # the first chunk only sees itself
    assert [each.keys for each in layout((2, 1), 2, copies=False).attention().segments] == [((0, 48),), ((0, 72),)]


def test_copies_lie_where_their_originals_do():
    first = [(each.grid, each.first, each.pool) for each in layout((2, 1, 3), 2, copies=True).stretches()]
    assert first == [((2, 2, 3), 0, 2), ((1, 4, 6), 2, 1), ((4, 4, 6), 2, 1)]


def test_rows_of_frames_have_as_many_tokens_each():
    made = layout((2, 1, 1), 2, copies=True)
    per_frame = torch.arange(5.0).view(1, 5, 1)  # two frames of context, a copy, two full frames
    rows = made.rows(per_frame)
    per_token = rows.repeat_interleave(made.tokens // rows.shape[1], dim=1).flatten().tolist()
    assert per_token == [0.0] * 6 + [1.0] * 6 + [2.0] * 24 + [3.0] * 24 + [4.0] * 24
    once = torch.zeros(1, 1, 1)
    assert made.rows(once) is once
    assert layout((2, 1), 2, copies=False).rows(per_frame) is per_frame


def test_layouts_are_values():
    assert hash(layout((2, 1), 1, copies=False)) == hash(layout([2, 1], 1, copies=False))


@pytest.mark.parametrize(
    ("partition", "grid", "message"),
    [
        ((), GRID, "at least 1 frame each"),
        ((1, 0), GRID, r"at least 1 frame each.*\(1, 0\)"),
        ((1, 1, 1), (4, 5), r"frames of 4 x 5 patches.*compressed_patch_size.*2 x 2.*the 1 oldest chunks"),
        ((1, 1, 1), (3, 4), "frames of 3 x 4 patches"),
    ],
)
def test_wrong_layouts_are_named(partition, grid, message):
    with pytest.raises(ValueError, match=message):
        ChunkLayout.of(partition, 2, grid, POOL)


def test_without_context_any_grid_will_do():
    assert ChunkLayout.of((1, 1), 2, (3, 5), POOL).tokens == 30
