import pytest

from anyflow_train.config.network import Architecture
from anyflow_train.config.run import Data
from anyflow_train.data.manifest import Manifest, check_compatible
from anyflow_train.data.shards import ShardSet
from anyflow_train.errors import UserError
from tests.data.helpers import make_manifest, make_shards

DATA = Data(shards="somewhere", frames=5, height=32, width=32, text_lengths=(4, 8))
NETWORK = Architecture(in_channels=3, text_dim=6)


def check(manifest: Manifest, data: Data = DATA, network: Architecture = NETWORK, vae: str | None = "abc") -> None:
    check_compatible(manifest, data, network, vae)


def test_fitting_shards_pass() -> None:
    check(make_manifest())
    check(make_manifest(), vae=None)


@pytest.mark.parametrize(
    ("data", "network", "vae", "message"),
    [
        ({"frames": 9}, {}, "abc", "data.frames: 9, but the shards of data.shards were made with 5 frames"),
        ({"height": 64}, {}, "abc", "data.height: 64"),
        ({"width": 64}, {}, "abc", "data.width: 64"),
        ({"text_lengths": (3, 4)}, {}, "abc", "data.text_lengths: [3, 4] cannot hold the longest text"),
        ({}, {"in_channels": 16}, "abc", "student.architecture.in_channels: 16"),
        ({}, {"text_dim": 4096}, "abc", "student.architecture.text_dim: 4096"),
        ({}, {"patch_size": (1, 3, 2)}, "abc", "student.architecture.patch_size"),
        ({}, {}, "xyz", "data.shards: encoded by the VAE of somewhere (abc)"),
    ],
)
def test_each_difference_names_its_key(data: dict, network: dict, vae: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check(make_manifest(), DATA.model_copy(update=data), NETWORK.model_copy(update=network), vae)
    assert str(caught.value).startswith(message)


def test_a_vae_known_by_name_alone_is_not_called_another() -> None:
    manifest = make_manifest()
    codec = manifest.codec.model_copy(update={"vae": "name:Wan-AI/some-model"})
    check(manifest.model_copy(update={"codec": codec}), vae="xyz")


def test_all_differences_are_reported_at_once() -> None:
    with pytest.raises(UserError) as caught:
        check(make_manifest(), DATA.model_copy(update={"frames": 9, "height": 64}), vae="xyz")
    assert len(str(caught.value).splitlines()) == 3


def test_prompts_are_refused_for_a_run_on_video() -> None:
    manifest = make_manifest().model_copy(update={"kind": "prompts", "latent_shape": None})
    with pytest.raises(UserError, match="prompts without video"):
        check(manifest)


@pytest.mark.parametrize("text", ["", "{}", '{"format": "something else"}'])
def test_a_foreign_manifest_is_one_clear_line(tmp_path, text: str) -> None:
    folder = make_shards(tmp_path / "shards", [2])
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="anyflow prepare") as caught:
        ShardSet.open(str(folder))
    assert "\n" not in str(caught.value)
