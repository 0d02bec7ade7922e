"""Imports point one way, and heavy ones stay in their rooms: read from the sources, nothing is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "anyflow_train"
# Room -> the rooms that it may import. What is not listed here (commands, export, __main__) is on top of all.
ALLOWED = {
    "errors": {"text"},
    "text": set(),
    "files": {"errors"},
    "devices": {"errors"},
    "config": {"errors", "text", "files"},
    "flow": {"errors", "config"},
    "models": {"errors", "config", "files", "flow"},
    "data": {"errors", "text", "devices", "config", "files", "flow", "models"},
    "objectives": {"errors", "config", "flow", "data", "models"},
    "tiny": {"errors", "config", "files", "flow", "data", "models"},
    "training": {"errors", "text", "devices", "config", "files", "flow", "data", "models", "objectives", "tiny"},
    "evaluation": {
        "errors",
        "text",
        "devices",
        "config",
        "files",
        "flow",
        "data",
        "models",
        "objectives",
        "tiny",
        "training",
    },
    "plan": {"errors", "text", "devices", "config", "files", "flow", "data", "models", "training", "evaluation"},
}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of everything that a file imports, inside of functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = room(path)
    if own not in ALLOWED:
        return
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("anyflow_train.")} - {"__version__"}
    assert rooms <= ALLOWED[own] | {own}


def test_only_the_engine_knows_the_launcher() -> None:
    users = {str(path.relative_to(PACKAGE)) for path in SOURCES if roots(path) & {"accelerate", "deepspeed"}}
    assert users <= {"training/engine/zero.py"}


def test_config_knows_no_torch() -> None:
    heavy = {"torch", "diffusers", "transformers", "numpy", "peft", "av"}
    found = {str(path.relative_to(PACKAGE)) for path in SOURCES if room(path) == "config" and roots(path) & heavy}
    assert found == set()


def test_only_config_knows_hydra() -> None:
    hydra = {room(path) for path in SOURCES if "hydra" in roots(path)}
    assert hydra <= {"config", "commands"}


def test_flow_is_functions_only() -> None:
    """No network, no engine: mathematics on tensors and callables."""
    for path in SOURCES:
        if room(path) == "flow":
            assert not any(name.startswith("torch.nn.Module") or name == "torch.nn" for name in imported(path)), path
            assert "nn.Module" not in path.read_text(encoding="utf-8"), path


def test_config_is_imported_without_torch() -> None:
    program = (
        "import sys, anyflow_train, anyflow_train.__main__, anyflow_train.config.compose, anyflow_train.config.help\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_pickled() -> None:
    users = {str(path.relative_to(PACKAGE)) for path in SOURCES if roots(path) & {"pickle", "cloudpickle", "dill"}}
    assert users == set()
