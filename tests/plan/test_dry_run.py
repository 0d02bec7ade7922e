"""A dry run against real steps: torch's own counter of operations, and a counter of the memory that is alive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from anyflow_train.config.compose import compose
from anyflow_train.config.run import RunConfig
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.models.build import build_network
from anyflow_train.objectives.types import Loss, Roles
from anyflow_train.plan import dry_run as dry_runs
from anyflow_train.plan.dry_run import Count, DryRun, Figures, block_counts, dry_run, dry_run_memory
from anyflow_train.plan.memory import plan_memory
from anyflow_train.training import recipe
from anyflow_train.training.updates import Term
from tests.conftest import with_nightly
from tests.plan.steps import counted, measured

# 3 blocks of width 128 on 5 x 8 x 12 tokens: activations take as much as all state, and a step part of a second. Texts
# are longer than the 32 tokens up to which a CPU keeps the attention scores, which no GPU does.
ARCHITECTURE = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 3,
}
SMALL = [f"student.architecture.{key}={value}" for key, value in ARCHITECTURE.items()] + [
    "teacher.codec=none",
    "data.frames=17",
    "data.height=128",
    "data.width=192",
    "data.text_lengths=[48]",
    "objective.text_dropout=0",
    "objective.derivative_precision=fp32",
    "engine=cpu",
    "engine.global_batch=4",
    "engine.micro_batch=1",
    "evaluation=none",
]
LORA = ["student/adapter=lora", "student.adapter.rank=16"]
FULL = ["student/adapter=full"]
# A mix of objectives needs a larger global batch.
FORWARD = ["wan1_3b_forward", "objective=flow_map"]
ONE_ROLLOUT = ["on_policy.calls=[2]", "engine.micro_batch=4"]
CAUSAL = "student.architecture.causal={chunk_partition: [1, 2, 2], full_chunk_limit: 2}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("network")
    build_network(ARCHITECTURE, 0).save_pretrained(place)
    return place


@pytest.fixture
def small(folder: Path) -> Callable[..., RunConfig]:
    def config(experiment: str, *overrides: str) -> RunConfig:
        given = [f"experiment={experiment}", *SMALL, f"teacher.source={folder}", f"student.init={folder}"]
        return compose("train", [*given, *overrides], None, 1)

    return config


_MADE: dict[str, DryRun] = {}


def from_all_blocks(config: RunConfig, figures: Count, fewest: int = 1) -> Figures:
    """The figures of networks that are built with all their blocks: slow if these are many."""
    return figures({count: count for count in block_counts(config)})


@contextmanager
def changed(**parts: object) -> Iterator[None]:
    """Dry runs inside the block use other functions in place of these of their module."""
    with pytest.MonkeyPatch.context() as patch:
        for name, part in parts.items():
            patch.setattr(dry_runs, name, part)
        yield


def on_cpu(config: RunConfig) -> DryRun:
    """One dry run of each config with the branches of a CPU, which several tests look at."""
    key = config.model_dump_json()
    if key not in _MADE:
        with changed(as_on_gpu=nullcontext):
            _MADE[key] = dry_run(config, 1)
    return _MADE[key]


CASES: dict[str, list[str]] = {
    "full": [*FORWARD, *FULL, "student.gradient_checkpointing=none"],
    "full, block": [*FORWARD, *FULL, "student.gradient_checkpointing=block"],
    "lora": [*FORWARD, *LORA, "student.gradient_checkpointing=none"],
    "lora, block": [*FORWARD, *LORA, "student.gradient_checkpointing=block"],
    "lora, selective": [*FORWARD, *LORA, "student.gradient_checkpointing=selective"],
    "stage 2, full": ["wan1_3b_on_policy", "objective=flow_map", *FULL, *ONE_ROLLOUT],
    "stage 2, lora": ["wan1_3b_on_policy", "objective=flow_map", *LORA, *ONE_ROLLOUT],
    "causal": ["wan1_3b_causal", *FULL, CAUSAL, "context.long_share=1", "context.bidirectional_probability=0"],
}
# Every call of a rollout chunk by chunk is computed once for its kind.
CASES["stage 2, causal"] = [
    *("wan1_3b_causal_on_policy", *LORA, *CASES["causal"][2:], *ONE_ROLLOUT),
    *("data.height=64", "data.width=96"),
]


# "full" is measured with checkpointing, and "lora" with the selective one; stage 2 and causal one by one.
@pytest.mark.parametrize(
    "case", with_nightly(CASES, ("full", "lora", "lora, block", "stage 2, full", "stage 2, causal"))
)
def test_memory_is_what_a_step_takes(case: str, small: Callable[..., RunConfig]) -> None:
    """Within 2 %, of all tensors together: state, gradients, activations, batches. The rest is what single operations
    allocate for themselves, which only the allocator sees."""
    config = small(*CASES[case])
    planned = plan_memory(config, on_cpu(config), "ddp", 1).tensors
    assert planned == pytest.approx(measured(config, 0), rel=0.02)


# Whole steps without checkpointing are counted for a new objective below. A causal stage 2 covers the last three.
@pytest.mark.parametrize(
    "case", with_nightly(CASES, ("full", "lora", "lora, block", "stage 2, full", "stage 2, lora", "causal"))
)
def test_operations_are_what_torch_counts(case: str, small: Callable[..., RunConfig]) -> None:
    config = small(*CASES[case])
    assert sum(on_cpu(config).operations.values()) == pytest.approx(counted(config, (0,)), rel=1e-9)


def test_products_in_fp8_count_as_others_do(small: Callable[..., RunConfig]) -> None:
    """Those of the teacher and of the adapters' base are in fp8; torch's own counter does not know their operator."""
    half = [*FORWARD, *LORA, "engine.precision=bf16", "student.gradient_checkpointing=none"]
    plain, eight = (dry_run(small(*half, *more), 1).work for more in ((), ("engine.fp8=frozen",)))
    assert eight == plain


@pytest.mark.parametrize("case", ["full, block", "lora, selective"])
def test_two_blocks_tell_what_all_do(case: str, small: Callable[..., RunConfig]) -> None:
    config = small(*CASES[case])
    quick = on_cpu(config)
    with changed(as_on_gpu=nullcontext, from_two_blocks=from_all_blocks):
        slow = dry_run(config, 1)
    assert quick.operations == pytest.approx(slow.operations)
    assert quick.sizes == slow.sizes
    planned = [plan_memory(config, found, "zero2", 4).tensors for found in (quick, slow)]
    assert planned[0] == pytest.approx(planned[1], rel=1e-3)


def test_what_validation_holds_grows_with_the_blocks_too(small: Callable[..., RunConfig]) -> None:
    """The fullest moment of one block is another one than that of two."""
    validation = ("evaluation=wan", "evaluation.videos=0", "evaluation.reference_videos=0", "evaluation.batch=24")
    config = small(*CASES["full"], *validation, "student.architecture.num_layers=6")
    quick = dry_run_memory(config, 1, 0)
    with changed(from_two_blocks=from_all_blocks):
        slow = dry_run_memory(config, 1, 0)
    planned = [plan_memory(config, each, "ddp", 1) for each in (quick, slow)]
    assert planned[0].moment == planned[1].moment
    assert planned[0].tensors == planned[1].tensors


@pytest.mark.nightly
def test_the_graph_of_a_rollout_keeps_every_cached_context(small: Callable[..., RunConfig]) -> None:
    """Two and three blocks with replayed calls tell what four blocks hold that compute every call."""
    chunks = "student.architecture.causal={chunk_partition: [1, 2, 2, 2, 2], full_chunk_limit: 3}"
    large = (chunks, "data.frames=33", "data.height=480", "data.width=832", "student.architecture.num_layers=4")
    config = small(*CASES["stage 2, causal"], *large)
    quick = dry_run_memory(config, 1, 0)
    with changed(from_two_blocks=from_all_blocks, chunk_by_chunk=lambda condition: False):
        slow = dry_run_memory(config, 1, 0)
    for part in ("student, earlier chunks", "student, forward"):
        highest = [max(moment.activations for name, moment in found.moments if name == part) for found in (quick, slow)]
        assert highest[0] == pytest.approx(highest[1], rel=0.03), part


@dataclass(frozen=True)
class TwoHalfJumps:
    """An objective that the plan has never heard of."""

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss:
        t = draw.uniform("time", 1).squeeze(1)
        z = draw.normal("noise", tuple(batch.latents.shape[1:]))
        with torch.no_grad():
            first = roles.student(z, t, t / 2, batch.condition)
            second = roles.student(first, t / 2, torch.zeros_like(t), batch.condition)
        error = (roles.student(z, t, torch.zeros_like(t), batch.condition) - first - second).square()
        return Loss(error.flatten(1).mean(dim=1), torch.ones_like(t), None, {})


def test_a_new_objective_is_counted_with_nothing_told(
    small: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "_main_term", lambda *_: Term(name="half jumps", objective=TwoHalfJumps()))
    config = small(*CASES["full"])
    with changed(as_on_gpu=nullcontext):
        found = dry_run(config, 1)  # of another recipe than the other tests'
    assert sum(found.operations.values()) == pytest.approx(counted(config, (0,)), rel=1e-9)
    assert found.samples["student, without gradient"] == 2 * found.samples["student, forward"] == 8


@pytest.mark.nightly
def test_what_is_drawn_is_a_mean(small: Callable[..., RunConfig]) -> None:
    """A term counts with its probability, and an update with its share of the steps."""
    config = small("wan1_3b_causal", *FULL, CAUSAL, "context.bidirectional_probability=0.25")
    always = small("wan1_3b_causal", *FULL, CAUSAL, "context.bidirectional_probability=1")
    never = small("wan1_3b_causal", *FULL, CAUSAL, "context.bidirectional_probability=0")
    sums = [sum(on_cpu(each).operations.values()) for each in (config, always, never)]
    assert sums[0] == pytest.approx(0.25 * sums[1] + 0.75 * sums[2])


def test_the_dearest_stage_is_planned(small: Callable[..., RunConfig]) -> None:
    """Stages of a schedule cost what runs with their keys cost; without samples of r < t there is no derivative."""
    only_t = "times.diffusion_share: 1.0, times.consistency_share: 0.0"
    case = CASES["full"]
    config = small(*case, "steps=100", f"objective.schedule=[{{steps: 90, changes: {{{only_t}}}}}]")
    found, dear = on_cpu(config), on_cpu(small(*case))
    assert found.operations == dear.operations
    assert found.stages[1] == dear.work > found.stages[0]
    assert found.stages[0] == pytest.approx(
        sum(count for work, count in found.operations.items() if not work.part.startswith("derivative"))
    )
    assert plan_memory(config, found, "ddp", 1) == plan_memory(config, dear, "ddp", 1)


def test_a_teacher_as_reference_is_in_the_plan(small: Callable[..., RunConfig]) -> None:
    """Its calls take two forwards of the guided teacher, and the student's one; its weights stay on the GPU."""
    data = (*CASES["full"], "objective.velocity=data", "objective.guidance=target", "objective.guidance_scale=3")
    validated = small(*data, "evaluation=wan", "evaluation.videos=0", "evaluation.reference_videos=0")
    found, without = on_cpu(validated), on_cpu(small(*data))
    forward = sum(count for work, count in found.operations.items() if work.part == "student, forward")
    assert found.calls["student"] == pytest.approx(forward / 4, rel=1e-3)
    assert found.calls["teacher"] == pytest.approx(2 * forward / 4, rel=0.02)  # it has one time embedder less
    assert found.sizes.keys() - without.sizes.keys() == {"teacher"}
    assert without.calls == {}


def test_a_gpu_keeps_no_scores_of_a_short_text(small: Callable[..., RunConfig]) -> None:
    """A CPU computes them by plain products, and keeps them."""
    config = small(*CASES["full"], "data.text_lengths=[16]", "data.frames=33")
    assert plan_memory(config, dry_run(config, 1), "ddp", 1).tensors < (
        plan_memory(config, on_cpu(config), "ddp", 1).tensors
    )


def test_validation_decodes_beside_the_networks(small: Callable[..., RunConfig]) -> None:
    """Wan2.1's VAE has 127 million weights; decoding takes more than a small network's step."""
    config = small(*CASES["lora"], "evaluation=wan", "data.height=480", "data.width=832")
    memory = plan_memory(config, dry_run(config, 1), "ddp", 1)
    assert memory.moment.name == "validation, decoding"
    assert memory.moment.activations > 4 * 126.9e6  # only then are its weights on the GPU
    assert not any("VAE" in name for name, _ in memory.state)


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        # trained weights, masters, moments, averages: in numbers of 4 bytes for each parameter, on 4 processes
        ("ddp", (1, 0, 2, 1)),
        ("zero1", (1, 1 / 4, 2 / 4, 1)),
        ("zero2", (1, 1 / 4, 2 / 4, 1)),
        ("zero3", (1 / 4, 0, 2 / 4, 1 / 4)),
    ],
)
def test_what_an_engine_cuts(engine: str, expected: tuple[float, ...], small: Callable[..., RunConfig]) -> None:
    config = small(*CASES["full"])
    found = on_cpu(config)
    parts = dict(plan_memory(config, found, engine, 4).state)
    names = ("weights, trained (float32)", "masters (float32)", "Adam's moments (float32)", "averages (EMA, float32)")
    whole = 4 * found.sizes["student"].trained
    assert [parts[name] for name in names] == pytest.approx([share * whole for share in expected], abs=32)
    memory = plan_memory(config, found, engine, 4)
    assert sum(size for _, size in memory.parts) == memory.total


def test_sizes_of_the_published_models() -> None:
    """Wan2.1's own count (1,418,996,800) and one more time embedder."""
    found = dry_run(compose("train", ["experiment=wan1_3b_forward"], None, 8), 8)
    assert found.sizes["student"].parameters == 1_418_996_800 + (256 + 1) * 1536 + (1536 + 1) * 1536
    assert found.sizes["teacher"] == found.sizes["teacher"]._replace(trained=0, frozen=0)
