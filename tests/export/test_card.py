"""The model card runs as it is written, with the packages that it names alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from anyflow_train.config.commands import ExportConfig
from anyflow_train.export import run
from anyflow_train.export.card import hub_id
from tests.export.runs import FULL, WITH_DELTA, make_run

# Runs the Python block of every card in its folder. Only the packages of its `pip install` line, with what they declare
# to need, can be imported or found.
PLAY = """
import importlib.metadata as metadata, importlib.machinery as machinery, os, pathlib, re, sys, warnings

def closure(names):
    seen, left = set(), list(names)
    while left:
        name = re.sub("[-_.]+", "-", left.pop()).lower()
        if name in seen:
            continue
        try:
            needed = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            continue
        seen.add(name)
        left += [re.match(r"[\\w.-]+", line)[0] for line in needed if "extra ==" not in line]
    return seen

folders = [pathlib.Path(folder) for folder in sys.argv[1:]]
cards = [(folder / "README.md").read_text() for folder in folders]
named = {name for card in cards for name in re.search("`pip install (.*?)`", card)[1].split()}
allowed = closure(named)
tops = {top for top, owners in metadata.packages_distributions().items()
        if {re.sub("[-_.]+", "-", owner).lower() for owner in owners} & allowed}
known = set(metadata.packages_distributions())

class Only(machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        # torch compiles with what is in its own folder; other top-level names must be declared.
        refused = top == "anyflow_train" or (top in known - tops)
        return None if refused else super().find_spec(name, path, target)

sys.meta_path = [Only if finder is machinery.PathFinder else finder for finder in sys.meta_path]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
warnings.simplefilter("ignore")
for folder, card in zip(folders, cards):
    os.chdir(folder)
    exec(card.split("```python\\n")[1].split("```")[0], {})
print("played")
"""


def play(*outs: Path) -> str:
    """Run the cards in one process. Returns what it wrote to stderr."""
    played = subprocess.run([sys.executable, "-c", PLAY, *map(str, outs)], capture_output=True, text=True, timeout=280)
    assert played.stdout.endswith("played\n"), played.stderr[-3000:]
    return played.stderr


def export(trained: Path, out: Path, **options) -> Path:
    run(ExportConfig(model=str(trained), out=str(out), **options))
    return out


def front(out: Path) -> dict:
    return ModelCard.load(out / "README.md").data.to_dict()


def test_the_code_of_every_card_runs_as_written(tmp_path: Path) -> None:
    student, lora, teacher = (tmp_path / name for name in ("student", "lora", "teacher"))
    outs = [
        export(make_run(student, FULL), student / "pipeline", prompt='a "red" ball'),
        export(student / "run", student / "transformer", format="transformer"),
        export(make_run(lora, WITH_DELTA), lora / "out", format="lora"),
        export(
            make_run(teacher, FULL, gate=0.0, kind="flow_matching"),
            teacher / "out",
            format="wan_pipeline",
            precision="fp32",
        ),
    ]
    pipeline, transformer, adapters, wan = outs
    # diffusers loads the adapters of the second time without a warning
    assert "delta_embedder" not in play(pipeline, transformer, adapters, wan)
    assert all((out / "video.gif").read_bytes().startswith(b"GIF") for out in outs)
    texts = [(out / "README.md").read_text() for out in outs]
    assert all("an any-step video diffusion model" in text for text in texts[:3])
    assert all('\ndtype = torch.bfloat16 if device == "cuda" else torch.float32\n' in text for text in texts[:3])
    assert "\ndtype = torch.float32\n" in texts[3]
    assert "a video diffusion teacher" in texts[3]
    assert "num_inference_steps=50" in texts[3]
    assert "guidance_scale=5.0" in texts[3]
    assert "any number" not in texts[3].lower()
    assert "has no second time" in texts[2]


def test_the_front_matter_is_read_by_the_hub(tmp_path: Path) -> None:
    trained = make_run(tmp_path, FULL)
    row = '{"step": %d, "validation/energy_distance_4": %s, "validation/energy_distance_4_low": 0.5, '
    row += '"validation/energy_distance_4_high": 0.75}\n'
    (trained / "metrics.jsonl").write_text(row % (5, 0.625) + row % (8, 99) + "{")
    out = export(trained, tmp_path / "out", format="transformer", datasets=("owner/clips",), license="mit")
    found = front(out)
    assert found["license"] == "mit"
    assert found["library_name"] == "diffusers"
    assert found["pipeline_tag"] == "text-to-video"
    assert found["datasets"] == ["owner/clips"]
    assert "base_model" not in found
    metric = found["model-index"][0]["results"][0]["metrics"][0]
    assert metric["value"] == 0.625
    assert (metric["args"]["low"], metric["args"]["high"]) == (0.5, 0.75)
    assert "0.625 [0.5, 0.75]" in (out / "README.md").read_text()  # the validation before the checkpoint, not after it


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("/data/models/Wan2.1-T2V-14B-Diffusers/", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        ("owner/model", "owner/model"),
        ("/data/model", None),
        ("runs/mine/checkpoints", None),
        (None, None),
    ],
)
def test_a_base_has_its_full_hub_id(source: str | None, found: str | None) -> None:
    assert hub_id(source) == found


def test_the_front_matter_of_a_published_base_names_it_with_its_license(tmp_path: Path) -> None:
    trained = make_run(tmp_path, {**WITH_DELTA}, init="Wan2.1-T2V-1.3B-Diffusers")
    out = export(trained, tmp_path / "out", format="lora")
    found = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert found["base_model"] == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert found["base_model_relation"] == "adapter"
    assert found["license"] == "apache-2.0"
    assert str(tmp_path) not in (out / "README.md").read_text()
