import pytest
import torch
from diffusers.models.transformers.transformer_anyflow_far import apply_rotary_emb
from torch.nn import functional as F

from tests.models.networks import clean_inputs, far_inputs, small, small_far, stock_far_twin

# Partitions with at most two full chunks, and the number of noisy frames.
LAYOUTS = [((3,), 3), ((1, 2), 3), ((1, 2, 1), 3), ((2, 1, 2, 1), 3)]
IDS = ["one chunk", "no context", "context", "two chunks of context"]


def arguments(partition, noisy, clean):
    return far_inputs(partition, noisy) | (clean_inputs(noisy) if clean else {})


@pytest.mark.parametrize("clean", [False, True], ids=["plain", "clean copy"])
@pytest.mark.parametrize(("partition", "noisy"), LAYOUTS, ids=IDS)
@torch.no_grad()
def test_outputs_are_those_of_diffusers(partition, noisy, clean):
    network = small_far()
    given = arguments(partition, noisy, clean)
    # Both compute in float32, in different order: roundings of a dozen layers on numbers of size one.
    expected = stock_far_twin(network)(**given).sample
    torch.testing.assert_close(network(**given).sample, expected, rtol=1e-5, atol=1e-5)


class MaskedAttention:
    """Self-attention for diffusers' module with a dense mask: its own has no backward on a CPU.

    The mask is made token by token from the rules, in diffusers' order: context, noisy, clean.
    """

    def __init__(self, partition, limit, clean):
        older = max(len(partition) - limit, 0)
        tokens = [("context", chunk) for chunk in range(older) for _ in range(6 * partition[chunk])]
        for kind in ("noisy", "clean") if clean else ("plain",):
            tokens += [(kind, chunk) for chunk in range(older, len(partition)) for _ in range(24 * partition[chunk])]
        self.mask = torch.tensor([[self.sees(*query, *key) for key in tokens] for query in tokens])

    @staticmethod
    def sees(kind, chunk, other, past):
        if (kind, other) == ("noisy", "noisy"):
            return chunk == past
        if (kind, other) == ("noisy", "clean"):
            return past < chunk
        return past <= chunk and not (kind == "clean" and other == "noisy")

    def __call__(self, attn, hidden_states, attention_mask=None, rotary_emb=None):
        heads = [
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for x in (
                attn.norm_q(attn.to_q(hidden_states)),
                attn.norm_k(attn.to_k(hidden_states)),
                attn.to_v(hidden_states),
            )
        ]
        query, key = (apply_rotary_emb(x, rotary_emb["query"]) for x in heads[:2])
        attended = F.scaled_dot_product_attention(query, key, heads[2], attn_mask=self.mask)
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("clean", [False, True], ids=["plain", "clean copy"])
@pytest.mark.parametrize(("partition", "noisy"), LAYOUTS[2:], ids=IDS[2:])
def test_outputs_and_gradients_are_those_of_a_dense_mask(partition, noisy, clean):
    network = small_far()
    stock = stock_far_twin(network)
    for block in stock.blocks:
        block.attn1.set_processor(MaskedAttention(partition, 2, clean))
    seen = []
    for each in (network, stock):
        given = arguments(partition, noisy, clean)
        latents = {name: x.requires_grad_() for name, x in given.items() if name.endswith("hidden_states")}
        output = each(**given).sample
        output.square().sum().backward()
        seen.append([output.detach(), *(x.grad for x in latents.values())])
    for ours, theirs in zip(*seen, strict=True):
        # float32 sums of up to a hundred terms, in another order; the gradients are of size ten.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    gradients = {name: weight.grad for name, weight in stock.named_parameters()}
    for name, weight in network.named_parameters():
        expected = gradients.pop(name)
        assert (weight.grad - expected).abs().max() <= 2e-5 * expected.abs().max(), name
    assert gradients == {}


def test_one_chunk_is_the_bidirectional_network():
    network, plain = small_far(), small()
    plain.load_state_dict({name: x for name, x in network.state_dict().items() if not name.startswith("far_")})
    given = far_inputs((3,), 3)
    found = network(**given).sample
    given.pop("chunk_partition")
    torch.testing.assert_close(found, plain(**given).sample, rtol=1e-5, atol=1e-5)


def changed_frames(before, after):
    """Noisy frames whose output changed."""
    return set((before != after).flatten(2).any(2).any(0).nonzero().flatten().tolist())


# Chunks of 1 | 2 | 1 | 2 frames, of which the last two are noisy: their frames are 0 and 1, 2 of the output.
@pytest.mark.parametrize(
    ("name", "frame", "expected"),
    [
        ("hidden_states", 0, {0, 1, 2}),  # context
        ("hidden_states", 2, {0, 1, 2}),  # context
        ("hidden_states", 3, {0}),  # the first noisy chunk: with a clean copy the second sees that instead
        ("hidden_states", 5, {1, 2}),
        ("clean_hidden_states", 0, {1, 2}),  # the copy of the first
        ("clean_hidden_states", 1, set()),  # the copy of the second, which no chunk may see
    ],
)
@torch.no_grad()
def test_a_frame_changes_what_may_see_it_and_nothing_else(name, frame, expected):
    network, given = small_far(), arguments((1, 2, 1, 2), 3, clean=True)
    before = network(**given).sample
    given[name] = given[name].clone()
    given[name][:, frame] += 1
    assert changed_frames(before, network(**given).sample) == expected


@torch.no_grad()
def test_without_copies_a_chunk_sees_the_full_ones_before_it():
    network, given = small_far(), far_inputs((1, 2, 1, 2), 3)
    before = network(**given).sample
    given["hidden_states"][:, 3] += 1
    assert changed_frames(before, network(**given).sample) == {0, 1, 2}


@torch.no_grad()
def test_times_may_be_given_once_per_sample_or_once():
    network, given = small_far(), arguments((1, 2, 1), 3, clean=True)
    names = {"timestep": 4, "r_timestep": 4, "clean_timestep": 3}
    values = {"timestep": [900.0, 500.0], "r_timestep": [100.0, 0.0], "clean_timestep": [20.0, 3.0]}
    per_sample = {name: torch.tensor(values[name]) for name in names}
    per_frame = {name: x[:, None].expand(2, names[name]) for name, x in per_sample.items()}
    expected = network(**given | per_frame).sample
    torch.testing.assert_close(network(**given | per_sample).sample, expected, rtol=1e-5, atol=1e-5)
    for name in names:
        once = network(**given | per_sample | {name: torch.tensor(7.0)}).sample
        expected = network(**given | per_frame | {name: torch.full((2, names[name]), 7.0)}).sample
        torch.testing.assert_close(once, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_copies_are_at_time_zero_unless_told_otherwise():
    network, given = small_far(), arguments((1, 2, 1), 3, clean=True)
    given.pop("clean_timestep")
    expected = network(**given, clean_timestep=torch.zeros(2, 3)).sample
    torch.testing.assert_close(network(**given).sample, expected, rtol=1e-6, atol=1e-6)
    assert (network(**given, clean_timestep=torch.tensor(50.0)).sample - expected).abs().max() > 1e-3


def test_modulation_is_kept_in_few_rows():
    network = small_far()
    seen = []
    network.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(tuple(given[2].shape[:2])))
    given = arguments((1, 2, 1), 3, clean=True)
    network(**given)
    once = {"timestep": torch.tensor([9.0, 5.0]), "r_timestep": torch.tensor(1.0)}
    network(**{name: x for name, x in given.items() if "clean" not in name} | once)
    # One row for the frame of context, four for each of two copied and three noisy frames; then one per sample.
    assert seen == [(2, 1 + 4 * (2 + 3)), (2, 1)]


def test_a_tuple_on_request():
    given = far_inputs((1, 2), 3)
    (sample,) = small_far()(**given, return_dict=False)
    assert torch.equal(sample, small_far()(**given).sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_partition": [1, 2]}, r"\(1, 2\) has 3 frames, but hidden_states has 4"),
        ({"chunk_partition": [4, 0]}, r"\(4, 0\)"),
        (
            {"clean_hidden_states": torch.zeros(2, 4, 4, 8, 12)},
            r"\(2, 3, 4, 8, 12\).*3 noisy frames.*\(2, 4, 4, 8, 12\)",
        ),
        ({"clean_timestep": torch.zeros(2, 4)}, r"timestep.*\(2, 4\)"),
        ({"timestep": torch.zeros(2, 3)}, r"timestep.*\(2, 3\)"),
        ({"hidden_states": torch.zeros(2, 4, 4, 9, 12)}, "multiples of the patch, 2"),
        ({"hidden_states": torch.zeros(2, 4, 4, 10, 12)}, "frames of 5 x 6 patches.*compressed_patch_size"),
        ({"return_kv_cache": True}, "only one of"),
    ],
)
def test_wrong_calls_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        small_far()(**arguments((1, 2, 1), 3, clean=True) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compressed_patch_size": (1, 3, 3)}, r"compressed_patch_size.*multiple.*\(1, 3, 3\)"),
        ({"compressed_patch_size": (2, 4, 4)}, "compressed_patch_size must be"),
        ({"compressed_patch_size": (1, 4, 2)}, "compressed_patch_size must be"),
        ({"full_chunk_limit": 0}, "full_chunk_limit must be 1 or more, not 0"),
        ({"chunk_partition": ()}, "chunk_partition"),
        ({"chunk_partition": (1, 0)}, r"chunk_partition.*\(1, 0\)"),
        ({"deltatime_type": "r-t"}, "deltatime_type"),
    ],
)
def test_wrong_constructions_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        small_far(**change)
