"""Roles on one base: each computes as it would alone, and training one does not change another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anyflow_train.config.network import Lora
from anyflow_train.errors import UserError
from anyflow_train.flow.types import Condition
from anyflow_train.models.adapters import add_lora, trainable_parameters
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.models.shared_base import SharedBase
from anyflow_train.models.transformer import AnyFlowTransformer3DModel
from tests.models.networks import inputs, small
from tests.models.peft_oracle import add_peft, peft_parameters

STUDENT = Lora(
    kind="lora",
    rank=3,
    alpha=6.0,
    targets=("attn1.to_q", "ffn.net.0.proj"),
    full_modules=("time_embedder", "delta_embedder"),
)
FAKE = Lora(kind="lora", rank=2, alpha=2.0, targets=("attn1.to_q", "attn2.to_v", "time_embedder.linear_1"))
SETTINGS = {"student": STUDENT, "fake_score": FAKE}
ROLES = [*SETTINGS, None]


def shared(network: AnyFlowTransformer3DModel | None = None) -> SharedBase:
    found = SharedBase(network or small())
    for role, settings in SETTINGS.items():
        found.add(role, settings, seed=4)
    return found


def moved(base: SharedBase, *roles: str) -> SharedBase:
    """Set adapters to nonzero values."""
    for role in roles:
        draw = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in base.parameters(role).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return base


def output(base: SharedBase, role: str | None) -> Tensor:
    with base.as_role(role):
        return base.network(**inputs()).sample


def alone(base: SharedBase, role: str) -> AnyFlowTransformer3DModel:
    """Build a network with the adapters of one role, with peft."""
    network = small()
    add_peft(network, SETTINGS[role], seed=5)
    theirs = peft_parameters(network)
    ours = base.parameters(role)
    assert list(theirs) == list(ours)
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
    return network


def gradients(base: SharedBase, role: str, backward: Callable[[Tensor], object]) -> dict[str, Tensor]:
    """Gradients of a role; checks that no other role has any."""
    backward(output(base, role).square().sum())
    for other in SETTINGS:
        found = [parameter.grad is not None for parameter in base.parameters(other).values()]
        assert all(found) if other == role else not any(found)
    base_weights = [p for name, p in base.network.named_parameters() if ".own." not in name]
    assert all(p.grad is None and not p.requires_grad for p in base_weights)
    return {name: parameter.grad for name, parameter in base.parameters(role).items() if parameter.grad is not None}


@pytest.mark.parametrize("role", SETTINGS)
def test_a_role_starts_as_the_adapters_of_a_network_of_its_own(role: str) -> None:
    network = small()
    add_lora(network, SETTINGS[role], seed=4)
    theirs, ours = trainable_parameters(network), shared().parameters(role)
    assert list(theirs) == list(ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("role", SETTINGS)
def test_a_role_is_the_network_with_its_adapters_alone(role: str) -> None:
    base = moved(shared(), *SETTINGS)
    network = alone(base, role)
    expected = network(**inputs()).sample
    assert torch.equal(output(base, role), expected)


@pytest.mark.parametrize("role", SETTINGS)
def test_its_gradients_are_those_of_that_network(role: str) -> None:
    base = moved(shared(), *SETTINGS)
    network = alone(base, role)
    network(**inputs()).sample.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in peft_parameters(network).items()}
    ours = gradients(base, role, torch.Tensor.backward)
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name  # pyright: ignore


def test_without_a_role_it_is_the_base() -> None:
    base = moved(shared(), *SETTINGS)
    expected = small().requires_grad_(False)(**inputs()).sample
    assert torch.equal(output(base, None), expected)
    assert torch.equal(base.network(**inputs()).sample, expected)
    untrained, expected = shared(), small()(**inputs()).sample
    assert all(torch.equal(output(untrained, role), expected) for role in SETTINGS)


@pytest.mark.parametrize("trained", SETTINGS)
def test_training_one_changes_no_other(trained: str) -> None:
    base = moved(shared(), *SETTINGS)
    before = {role: output(base, role) for role in ROLES}
    optimizer = torch.optim.AdamW(base.parameters(trained).values(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        output(base, trained).square().sum().backward()
        optimizer.step()
    after = {role: output(base, role) for role in ROLES}
    assert {role for role in ROLES if not torch.equal(after[role], before[role])} == {trained}


@pytest.mark.parametrize("during", ["same", "other", None])
@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpointing_recomputes_as_the_role_of_the_forward(during: str | None, when: str) -> None:
    """It holds for any active role during the backward, with checkpointing enabled before or after adding roles."""
    expected = gradients(moved(shared(), *SETTINGS), "student", torch.Tensor.backward)
    network = small()
    if when == "before":
        network.enable_gradient_checkpointing()
    base = moved(shared(network), *SETTINGS)
    network.enable_gradient_checkpointing()

    def backward(loss: Tensor) -> None:
        with base.as_role({"same": "student", "other": "fake_score", None: None}[during]):
            loss.backward()

    found = gradients(base, "student", backward)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_loss_through_two_roles_gives_each_its_own_gradient() -> None:
    """Gradient checkpointing is on, so recomputations alternate between roles."""
    base = moved(shared(), *SETTINGS)
    wanted = {role: gradients(moved(shared(), *SETTINGS), role, torch.Tensor.backward) for role in SETTINGS}
    base.network.enable_gradient_checkpointing()
    sum(output(base, role).square().sum() for role in SETTINGS).backward()  # pyright: ignore
    for role, expected in wanted.items():
        ours = base.parameters(role)
        assert all(torch.equal(ours[name].grad, gradient) for name, gradient in expected.items())  # pyright: ignore


def test_the_active_role_comes_back() -> None:
    base = moved(shared(), *SETTINGS)
    expected = {role: output(base, role) for role in ROLES}
    with base.as_role("student"):
        assert torch.equal(output(base, "fake_score"), expected["fake_score"])
        assert torch.equal(output(base, None), expected[None])
        with pytest.raises(RuntimeError, match="on purpose"), base.as_role("fake_score"):
            raise RuntimeError("on purpose")
        assert torch.equal(base.network(**inputs()).sample, expected["student"])
    assert torch.equal(base.network(**inputs()).sample, expected[None])


def test_switching_changes_no_requires_grad() -> None:
    base = shared()
    base.add("teacher", FAKE, seed=1)
    base.freeze("teacher")
    before = {name: parameter.requires_grad for name, parameter in base.network.named_parameters()}
    for role in [*ROLES, "teacher"]:
        output(base, role)
    assert {name: parameter.requires_grad for name, parameter in base.network.named_parameters()} == before
    for role, trained in (("student", True), ("fake_score", True), ("teacher", False)):
        assert {parameter.requires_grad for parameter in base.parameters(role).values()} == {trained}
    assert not output(base, "teacher").requires_grad


def test_a_flow_map_is_called_as_its_role() -> None:
    base = moved(shared(), *SETTINGS)
    maps = {role: base.flow_map(role, NetworkFlowMap(base.network, None)) for role in ROLES}
    given = inputs()
    times = (given["timestep"] / 1000, given["r_timestep"] / 1000)
    x, condition = given["hidden_states"], Condition(given["encoder_hidden_states"])
    for role, flow_map in maps.items():
        with base.as_role(role):
            expected = NetworkFlowMap(base.network, None)(x, *times, condition)
        assert torch.equal(flow_map(x, *times, condition), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert output(base, "student").dtype == torch.bfloat16


def test_whole_modules_can_be_read_from_elsewhere() -> None:
    """If the base is sharded, copies of its modules are read from files."""
    network = small()
    base = SharedBase(network, lambda name: torch.full_like(network.get_parameter(name), 0.5))
    base.add("student", STUDENT, seed=4)
    copies = {name: p for name, p in base.parameters("student").items() if "lora" not in name}
    assert len(copies) == 8
    assert all((parameter == 0.5).all() for parameter in copies.values())


@pytest.mark.parametrize("full_modules", [("patch_embedding", "time_proj"), ("blocks.0", "attn2"), ("proj_out",)])
def test_any_module_can_be_trained_whole(full_modules: tuple[str, ...]) -> None:
    """Includes modules whose weights are accessed from outside, and one inside another."""
    base = shared()
    settings = Lora(kind="lora", rank=2, targets=("blocks.1.attn1.to_q",), full_modules=full_modules)
    base.add("third", settings, seed=1)
    network = small()
    add_lora(network, settings, seed=1)
    assert sorted(base.parameters("third")) == sorted(trainable_parameters(network))
    output(moved(base, "third"), "third").square().sum().backward()
    assert all(parameter.grad is not None for parameter in base.parameters("third").values())
    assert not torch.equal(output(base, "third"), output(base, None))


def test_wrong_settings_are_reported() -> None:
    base = shared()
    wrong = Lora(kind="lora", targets=("attn1.to_z",))
    with pytest.raises(UserError, match=r"^on_policy\.adapter\.targets: the network has no module 'attn1\.to_z'"):
        base.add("third", wrong, 0, where="on_policy.adapter")
    with pytest.raises(UserError, match=r"^third\.adapter\.targets"):
        base.add("third", wrong, 0)
    assert base.roles == ("student", "fake_score")
    with pytest.raises(ValueError, match="exists already"):
        base.add("student", STUDENT, 0)
    for call in (base.parameters, base.freeze):
        with pytest.raises(ValueError, match="unknown role 'third'"):
            call("third")
    with pytest.raises(ValueError, match="unknown role 'third'"), base.as_role("third"):
        pass


def test_three_roles_take_the_memory_of_one_network_and_their_adapters() -> None:
    """Compares bytes of storage for student, fake score and teacher; three networks would take three times the base."""
    network = small(num_attention_heads=8, ffn_dim=384)
    one = stored_bytes(network)
    base = shared(network)
    adapters = sum(parameter.nbytes for role in SETTINGS for parameter in base.parameters(role).values())
    assert stored_bytes(network) == one + adapters
    assert stored_bytes(network) < 1.2 * one


def stored_bytes(network: torch.nn.Module) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in network.parameters()}
    return sum(storages.values())
