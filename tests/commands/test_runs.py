"""`anyflow runs`: what it says about run directories, and what it deletes; sweeps as models; messages of runs."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anyflow_train.__main__ import main
from anyflow_train.commands import train
from anyflow_train.config.run import RunConfig
from anyflow_train.training.checkpoints.config_file import saved_config
from anyflow_train.training.checkpoints.run_directory import RunDirectory, runs_of_sweep
from anyflow_train.training.reporting.notify import Notifier
from anyflow_train.training.reporting.tracking import Trackers


def make(folder: Path, steps: tuple[int, ...], best: int | None = None, **config: Any) -> Path:
    for step in steps:
        place = folder / "checkpoints" / f"step_{step:08d}"
        place.mkdir(parents=True)
        (place / "weights.safetensors").write_bytes(b"0" * 1000)
    base = {"steps": 10, "evaluation": {"best_metric": "energy_distance_4"}}
    (folder / "config.json").write_text(json.dumps({**base, **config}))
    (folder / "lock").write_text("")
    if best is not None:
        (folder / "checkpoints" / "best").write_text(json.dumps({"step": best}))
    row = {"step": steps[-1], "validation/energy_distance_4": 0.25}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + '\n{"st')
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells[2:]}


def test_a_table_says_how_far_each_run_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "stopped", (2, 4))
    done = make(tmp_path / "sweep" / "lr-1", (10,))
    (done / "done.json").write_text('{"step": 10}')
    make(tmp_path / "busy\x1b[31m", (6,))
    assert main(["runs", str(tmp_path)]) == 0
    found = rows(capsys.readouterr().out)
    assert found["stopped"] == ["stopped", "4/10", "energy_distance_4 0.25", "0.00 GiB"]
    assert found["sweep/lr-1"][:2] == ["finished", "10/10"]
    assert found["busy\\x1b[31m"][0] == "stopped"  # a name cannot colour the terminal


def test_a_run_that_holds_its_lock_is_running_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = make(tmp_path / "run", (2, 4))
    # A record lock belongs to a process, so another one must hold it.
    code = (
        f"import fcntl, sys; f = open({str(folder / 'lock')!r}, 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True)"
    )

    with subprocess.Popen(
        [sys.executable, "-c", code + "; sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout
        holder.stdout.readline()
        assert main(["runs", str(tmp_path), "prune=true"]) == 0
        assert rows(capsys.readouterr().out)["run"][0] == "running"
        assert len(names(folder)) == 2
        holder.communicate()


def test_pruning_keeps_what_is_needed_to_go_on_or_to_export(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = make(tmp_path / "first", (1, 2, 3, 4, 5, 6), best=2, checkpoint={"keep_every": 3})
    make(tmp_path / "second", (1,), student={"init": str(first / "checkpoints" / "step_00000001")})
    for name in ("damaged_step_00000002", ".step_00000009.tmp"):
        (first / "checkpoints" / name).mkdir()
    (first / "profile").mkdir()
    assert main(["runs", f"folder={tmp_path}"]) == 0
    assert "prune=true shows and deletes them" in capsys.readouterr().out
    assert len(names(first)) == 8
    assert main(["runs", f"folder={tmp_path}", "prune=true"]) == 0
    kept = {"used by another run": 1, "best": 2, "milestone": 3, "last": 6}
    assert names(first) == [f"step_{step:08d}" for step in kept.values()]
    said = capsys.readouterr().out
    assert "deleted 5 folders" in said
    assert said.count("deleting ") == 5
    assert not (first / "profile").exists()
    assert names(tmp_path / "second") == ["step_00000001"]


@pytest.mark.parametrize("words", [["missing"], ["empty"], ["empty", "prune=perhaps"]])
def test_a_mistake_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / words[0]), *words[1:]]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_sweep_stands_for_its_finished_runs(tmp_path: Path) -> None:
    for name, finished in (("lr-1", True), ("lr-2", False), ("lr-3", True)):
        (tmp_path / name).mkdir()
        if finished:
            (tmp_path / name / "done.json").write_text('{"step": 1}')
    labels = ["lr-1", "lr-2", "lr-3", "../outside"]
    (tmp_path / "sweep.json").write_text(json.dumps([{"label": label, "folder": "/moved"} for label in labels]))
    assert runs_of_sweep(str(tmp_path)) == [tmp_path / "lr-1", tmp_path / "lr-3"]
    assert runs_of_sweep(str(tmp_path / "lr-1")) == []


@pytest.fixture
def address() -> Iterator[tuple[str, list[dict]]]:
    """A web address on this machine, and the messages that it got."""
    found: list[dict] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_POST(self) -> None:
            found.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook/secret", found
    server.shutdown()
    server.server_close()


def config(folder: Path, notify: str | None) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "run",
            "out": str(folder),
            "steps": 4,
            "notify": notify,
            "student": {"architecture": {}},
            "objective": {"kind": "flow_matching"},
            "data": {"shards": "shards", "frames": 5, "height": 32, "width": 32},
        }
    )


def test_the_end_of_a_run_and_its_failure_are_sent(
    tmp_path: Path, address: tuple[str, list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, found = address
    one = config(tmp_path, url)
    monkeypatch.setattr(train.training, "run", lambda *_: 0)
    train.run(one)
    RunDirectory.of(one).path.mkdir()
    RunDirectory.of(one).write_done({"step": 4})
    train.run(one)

    def fail(*_: object) -> int:
        raise RuntimeError("no more cake\nsecond line")

    monkeypatch.setattr(train.training, "run", fail)
    with pytest.raises(RuntimeError):
        train.run(one)
    assert [message["state"] for message in found] == ["stopped", "finished", "failed"]
    assert found[1]["text"] == found[1]["content"] == "run: finished (step 4/4)"
    assert found[2]["text"] == "run: failed: no more cake"


def test_the_first_step_that_is_not_finite_is_sent_once(tmp_path: Path, address: tuple[str, list[dict]]) -> None:
    url, found = address
    one = config(tmp_path, url)
    RunDirectory.of(one).path.mkdir()
    trackers = Trackers(one, RunDirectory.of(one), 0)
    for step, skipped in enumerate((0, 1, 2), 1):
        trackers.log(step, {"skipped": skipped})
    trackers.close()
    assert [(message["state"], message["step"]) for message in found] == [("not finite", 2)]


def test_an_address_that_does_not_answer_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Notifier(config(tmp_path, "http://127.0.0.1:9/")).send("finished", "finished")
    assert "warning: notify: the message was not delivered" in capsys.readouterr().err


def test_the_address_is_not_saved_with_the_run(tmp_path: Path) -> None:
    assert "secret" not in json.dumps(saved_config(config(tmp_path, "https://hook.example/secret")))


def test_pruning_deletes_only_what_a_run_wrote_also_if_its_files_are_damaged(tmp_path: Path) -> None:
    run = make(tmp_path / "run", (1, 2, 3, 4, 5, 6), checkpoint={"keep_every": 3})
    last, config = run / "checkpoints" / "step_00000006", (run / "config.json").read_text()
    (last / "config.json").write_text(config)
    (last / "state.json").write_text('{"state": {"best": {"step": 2}}}')
    (run / "config.json").write_text(config[:-9])
    (run / "checkpoints" / "best").write_text("[" * 100_000)
    (run / "checkpoints" / "step_notes").mkdir()
    (run / "checkpoints" / "step_00000009").write_text("a file")
    (run / "checkpoints" / "step_00000008").symlink_to(tmp_path)
    assert main(["runs", str(tmp_path), "prune=true"]) == 0
    kept = {"best": "step_00000002", "milestone": "step_00000003", "last": "step_00000006"}
    assert names(run) == [*kept.values(), "step_00000008", "step_notes"]
