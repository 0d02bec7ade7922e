"""Damaged files of every kind that is read: only clear errors come out, and nothing is written outside.

Each kind gets 50 mutations in the suite, and 1,000 with `-m nightly`.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyflow_train.config.run import RunConfig
from anyflow_train.data.shards import BadSampleError, ShardSet
from anyflow_train.data.tar import BLOCK, TarWriter, scan
from anyflow_train.errors import UserError
from anyflow_train.files import file_sha256, to_json
from anyflow_train.training.checkpoints.config_file import decode_saved
from anyflow_train.training.checkpoints.reading import (
    DamagedCheckpoint,
    content_checksum,
    read_info,
    read_network,
    read_step,
    verify_checkpoint,
)
from anyflow_train.training.checkpoints.state import Best, TrainState
from anyflow_train.training.checkpoints.writing import save_checkpoint
from tests.data.helpers import make_shards

CLEAR = (UserError, BadSampleError, DamagedCheckpoint)
NUMBERS = st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf")])
TEXTS = st.sampled_from(["", "../x", "/etc/passwd", "a\x00b", "\x1b[2J", "x; touch PWNED #", "\u202e", "1", "é" * 300])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(params=[50, pytest.param(1000, marks=pytest.mark.nightly)])
def mutations(request: pytest.FixtureRequest) -> int:
    return request.param


def places(node: Any, path: tuple = ()) -> list[tuple]:
    """List the paths to all values of decoded JSON, except the whole."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, value in pairs for found in ((*path, key), *places(value, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, content: Any) -> Any:
    """Change, remove or add up to three values of decoded JSON, or replace the whole."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from([(), *places(content)])) or (None,)
        if last is None:
            if draw(st.integers(0, 9)) == 0:
                return draw(VALUES)
            continue
        node = content
        for key in parents:
            node = node[key]
        action = draw(st.sampled_from(["change", "change", "remove", "add"]))
        if action == "remove":
            del node[last]
        elif action == "add" and isinstance(node, dict):
            node[draw(TEXTS)] = draw(VALUES)
        else:
            node[last] = draw(VALUES)
    return content


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    data = bytes(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        action = draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
        if action == "set":
            data = data[:place] + bytes([draw(st.integers(0, 255))]) + data[place + 1 :]
        elif action == "cut":
            data = data[:place]
        elif action == "insert":
            data = data[:place] + draw(st.binary(max_size=16)) + data[place:]
        else:
            data = data[:place] + data[place : place + BLOCK] * 2 + data[place + BLOCK :]
    return data


def run_mutations(count: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], object]) -> Counter[str]:
    """Check mutations, and count the results: `accepted`, or the name of the clear error."""
    results: Counter[str] = Counter()

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def each(mutation: Any) -> None:
        try:
            check(mutation)
        except CLEAR as error:
            for line in str(error).split("\n"):
                assert line.isprintable()
            results[type(error).__name__] += 1
        else:
            results["accepted"] += 1

    each()
    print(dict(results))
    return results


def read_all(folder: Path) -> None:
    """Read the first samples that the manifest lists. Raises the error of the first bad one."""
    shards = ShardSet.open(str(folder))
    for index in range(min(len(shards), 4)):
        shards.read(index)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["manifest.json", "shard-000000.index.json"])
def test_manifest_and_index(tmp_path: Path, name: str, mutations: int) -> None:
    """An index that cannot be decoded is made again from the tar, so most of its mutations are accepted."""
    folder = make_shards(tmp_path / "shards", [2, 2])
    path, before = folder / name, files_in(tmp_path)
    good = path.read_bytes()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        if name != "manifest.json":
            seal(folder)
        read_all(folder)

    content = changed(json.loads(good)).map(lambda value: json.dumps(value).encode())
    results = run_mutations(mutations, content | damaged(good), check)
    assert results.keys() <= {"UserError", "BadSampleError", "accepted"}
    assert files_in(tmp_path) == before


def test_places_and_checksums_in_an_index(tmp_path: Path, mutations: int) -> None:
    """An index that is an index, with other numbers and keys: no sample is read from other bytes."""
    folder = make_shards(tmp_path / "shards", [2, 2])
    path, whole = folder / "shard-000000.index.json", (folder / "shard-000000.tar").stat().st_size
    good, before = json.loads(path.read_text()), files_in(tmp_path)
    numbers = st.sampled_from([0, 1, 8, 511, 512, 1024, whole - 1, whole, whole + 1, 2**31, 2**63, 2**64, 10**30])
    changes = st.tuples(st.integers(0, 1), st.integers(0, 5), numbers, TEXTS)

    def check(chosen: list[tuple[int, int, int, str]]) -> None:
        content = copy.deepcopy(good)
        for entry, place, number, text in chosen:
            content["entries"][entry][place] = number if place else text
        path.write_text(json.dumps(content))
        seal(folder)
        read_all(folder)
        assert [entry[1:4] for entry in content["entries"]] == [entry[1:4] for entry in good["entries"]]

    assert run_mutations(mutations, st.lists(changes, min_size=1, max_size=3), check)["BadSampleError"] > 0
    assert files_in(tmp_path) == before


def seal(folder: Path) -> None:
    """Put the checksum of the first shard's index into the manifest, as whoever means harm does."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["index_sha256"] = file_sha256(folder / "shard-000000.index.json")
    path.write_text(json.dumps(manifest))


def run_config() -> RunConfig:
    student = {"architecture": {"in_channels": 3, "text_dim": 6, "num_layers": 1}}
    data = {"shards": "somewhere", "frames": 5, "height": 32, "width": 32, "text_lengths": [8]}
    return RunConfig.model_validate(
        {"name": "a", "steps": 1, "student": student, "objective": {"kind": "flow_map"}, "data": data}
    )


@pytest.mark.parametrize("name", ["state.json", "config.json", "network.json"])
def test_files_of_a_checkpoint(tmp_path: Path, name: str, mutations: int) -> None:
    state = TrainState(1, 8, 8, best=Best(1, "energy_distance_4", 0.5), metrics={"energy_distance_4": 0.5})
    good = save_checkpoint(tmp_path / "good", run_config(), state, {"student": 1}, {})
    checkpoint = Path(shutil.copytree(good, tmp_path / "run" / good.name))
    state_file, before = checkpoint / "state.json", files_in(tmp_path)
    whole = json.loads((good / "state.json").read_text())
    del whole["checksum"]

    def check(mutation: Any) -> None:
        content = whole
        if name == "state.json":
            content = mutation
        else:
            (checkpoint / name).write_text(json.dumps(mutation))
            content = copy.deepcopy(whole)
            content["files"][name] = file_sha256(checkpoint / name)
        # With the right checksum of a wrong content, as whoever means harm writes it.
        sealed = {**content, "checksum": content_checksum(content)} if isinstance(content, dict) else content
        state_file.write_bytes(to_json(sealed))
        read_step(checkpoint)
        read_network(checkpoint)
        decode_saved(read_info(checkpoint).config, str(checkpoint))
        verify_checkpoint(checkpoint)

    # A number that JSON does not have, or half a character, cannot be in a file that was sealed.
    content = whole if name == "state.json" else json.loads((good / name).read_text())
    assert run_mutations(mutations, changed(content), check)
    assert files_in(tmp_path) == before


def test_the_bytes_of_a_state(tmp_path: Path, mutations: int) -> None:
    checkpoint = save_checkpoint(tmp_path, run_config(), TrainState(1, 8, 8), {"student": 1}, {})
    path = checkpoint / "state.json"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        read_info(checkpoint)

    assert "DamagedCheckpoint" in run_mutations(mutations, damaged(path.read_bytes()), check)


def test_tar_headers(mutations: int) -> None:
    file = io.BytesIO()
    tar = TarWriter(file)
    for name in ("a.mp4", "a.txt", "b" * 150 + ".mp4", "é.json"):
        tar.add(name, b"x" * 600)
    tar.finish()

    def check(data: bytes) -> None:
        samples, damage = scan(io.BytesIO(data))
        for member in (member for files in samples.values() for member in files.values()):
            assert 0 <= member.offset <= member.offset + member.size <= len(data)
        if damage is not None:
            raise UserError("tar", damage)

    assert "UserError" in run_mutations(mutations, damaged(file.getvalue()), check)


@pytest.mark.parametrize("kind", [[], {}, None, 1])
def test_a_kind_of_another_type_is_one_sentence(kind: object) -> None:
    content = run_config().model_dump(mode="json")
    content["objective"]["kind"] = kind
    with pytest.raises(UserError, match="objective"):
        decode_saved(content, "config.json")
