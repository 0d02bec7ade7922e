"""`anyflow watch` and `anyflow report`: what they read, what they serve, and what a browser shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from anyflow_train.__main__ import main
from anyflow_train.errors import UserError
from anyflow_train.watch import runs
from anyflow_train.watch.metrics import Metrics
from anyflow_train.watch.report import render
from anyflow_train.watch.runs import Watch
from anyflow_train.watch.server import application
from tests.browser import CHROMIUM, needs_a_browser

EVIL = "<img src=x onerror=alert(1)>"


def row(step: int, **more: Any) -> str:
    values = {"loss": 1 / step, "gradient_norm": 0.5, "samples_per_second": 40.0, "memory_gib": 1.5, "skipped": 0}
    return json.dumps({"step": step, "seconds_per_step": 0.5, **values, **more}) + "\n"


def validation(step: int, **values: Any) -> str:
    numbers = {f"validation/energy_distance_{n}{end}": 1 / n + step for n in (1, 4) for end in ("", "_low", "_high")}
    return json.dumps({"step": step, **numbers, **values}) + "\n"


def make(folder: Path, lines: str, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"steps": 400, "evaluation": {"every": 100}, **config}))
    (folder / "lock").write_text("")
    (folder / "metrics.jsonl").write_text(lines)
    return folder


def add_video(folder: Path, step: int, content: bytes = b"video") -> Path:
    place = folder / "validation" / f"step_{step:08d}"
    place.mkdir(parents=True)
    (place / "grid.mp4").write_bytes(content)
    return place / "grid.mp4"


def test_a_live_run_is_followed_without_reading_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(row(1) + row(2) + '{"step": 3, "lo')
    metrics = Metrics(path, 100, 0)
    assert [one["step"] for one in metrics.read()] == [1, 2]
    with path.open("a") as file:
        file.write('ss": NaN}\n' + row(4))
    read: list[bytes] = []
    monkeypatch.setattr(
        Metrics, "_lines", lambda own, data, before=Metrics._lines: read.append(data) or before(own, data)
    )
    assert [(one["step"], one["loss"]) for one in metrics.read()] == [(3, None), (4, 0.25)]
    assert read[0].startswith(b'{"step": 3')
    assert metrics.read() == []
    replaced = tmp_path / "new"
    replaced.write_text(row(1))
    os.replace(replaced, path)
    assert [one["step"] for one in metrics.read()] == [1]  # a resumed run wrote a new file


def long_file(path: Path, rows: int) -> None:
    with path.open("w") as file:
        for step in range(1, rows + 1):
            file.write(row(step))
            if step % 10_000 == 0:
                file.write(validation(step))


def test_a_long_file_is_sampled_with_all_of_its_validations(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    long_file(path, 100_000)
    metrics = Metrics(path, 200, 10_000)
    found = metrics.read()
    steps = [one["step"] for one in found]
    assert steps == sorted(steps)
    assert steps[0] == 1
    assert steps[-1] == 100_000
    assert 200 <= len(found) < 230
    measured = [one["step"] for one in found if "validation/energy_distance_4" in one]
    assert measured == list(range(10_000, 100_001, 10_000))
    with path.open("a") as file:
        file.write(row(100_001))
    assert [one["step"] for one in metrics.read()] == [100_001]


def test_fifty_long_runs_open_within_two_seconds(tmp_path: Path) -> None:
    first = make(tmp_path / "run0", "", evaluation={"every": 10_000})
    long_file(first / "metrics.jsonl", 100_000)
    for number in range(1, 50):
        folder = make(tmp_path / f"run{number}", "", evaluation={"every": 10_000}, seed=number)
        (folder / "metrics.jsonl").unlink()
        os.link(first / "metrics.jsonl", folder / "metrics.jsonl")
    start = time.process_time()
    text = json.dumps(Watch(tmp_path).state())
    assert time.process_time() - start < 2.0
    assert len(json.loads(text)["runs"]) == 50


def test_the_state_of_runs_and_their_differences(tmp_path: Path) -> None:
    first = make(tmp_path / "a", row(1) + row(2, skipped=3), optimizer={"lr": 1})
    make(tmp_path / "sweep" / "b", row(1), optimizer={"lr": 2})
    (first / "checkpoints" / "damaged_step_00000001").mkdir(parents=True)
    add_video(first, 100)
    cells = [{"model": "teacher", "steps": 4, "energy_distance": {"value": 0.2, "low": 0.1, "high": 0.3}}]
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(json.dumps({"cells": cells}))
    watch = Watch(tmp_path)
    state = watch.state()
    assert state["differences"] == {"optimizer.lr": {"a": "1", "sweep/b": "2"}}
    run = state["runs"]["a"]
    assert (run["state"], run["step"], run["steps"], run["videos"]) == ("stopped", 2, 400, [100])
    assert run["teacher"] == {4: [0.2, 0.1, 0.3]}
    assert len(run["warnings"]) == 2
    with (first / "metrics.jsonl").open("a") as file:
        file.write(row(3))
    later = watch.state(state["serial"])
    assert [one["step"] for one in later["runs"]["a"]["rows"]] == [3]
    assert later["runs"]["sweep/b"]["rows"] == []


@pytest.mark.parametrize("report", [{"cells": 3}, {"cells": [{"model": "teacher"}]}, {"cells": [3]}, {}])
def test_a_run_that_others_wrote_into_does_not_hide_the_rest(tmp_path: Path, report: Any) -> None:
    make(tmp_path / "a", row(1), evaluation=3)
    make(tmp_path / "b", row(2))
    add_video(tmp_path / "a", 100).parent.rename(tmp_path / "a" / "validation" / "step_old")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(json.dumps(report))
    found = Watch(tmp_path).state()["runs"]
    assert found["b"]["step"] == 2
    assert not found["a"]["videos"]
    assert not found["a"]["teacher"]


def test_a_page_that_is_open_reads_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    before = runs.read_object
    monkeypatch.setattr(runs, "read_object", lambda path: read.append(path.name) or before(path))
    folder = make(tmp_path / "a", row(1))
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("{}")
    watch = Watch(tmp_path)
    watch.state()
    assert {"config.json", "report.json"} <= set(read)
    read.clear()
    watch.state()
    assert read == []
    (folder / "config.json").write_text('{"steps": 800}')  # a resumed run may have more steps
    os.utime(folder / "config.json", (1, 1))
    assert watch.state()["runs"]["a"]["steps"] == 800


def test_only_this_machine_reads_and_nothing_outside(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    folder = make(tmp_path / "runs" / "a", row(1))
    add_video(folder, 100)
    outside = tmp_path / "secret.mp4"
    outside.write_bytes(b"secret")
    (folder / "validation" / "step_00000200").mkdir()
    (folder / "validation" / "step_00000200" / "grid.mp4").symlink_to(outside)
    client = TestClient(application(Watch(tmp_path / "runs")), base_url="http://127.0.0.1:8787")
    assert client.get("/").headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert list(client.get("/api/state").json()["runs"]) == ["a"]
    assert client.get("/api/video?run=a&step=100").content == b"video"
    for path in ("run=a&step=200", "run=../../secret&step=100", "run=a&step=1e2", "run=a", "run=a&step=../100"):
        assert client.get(f"/api/video?{path}").status_code == 404, path
    for path in ("/../config.json", "/a/config.json", "/%2e%2e/secret.mp4", "/static/app.js"):
        assert client.get(path).status_code == 404, path
    for host in ("evil.example", "evil.example:8787", "127.0.0.1.evil.example"):
        assert client.get("/api/state", headers={"Host": host}).status_code == 400
    assert client.post("/api/state").status_code == 405
    assert client.delete("/api/video?run=a&step=100").status_code == 405


def test_a_report_is_one_file_without_links_and_escapes_names(tmp_path: Path, capsys) -> None:
    folder = make(tmp_path / EVIL, row(1) + validation(100, **{"validation/</script>_4": 1}))
    for step, size in ((100, 8_000_000), (200, 8_000_000), (300, 4_000_000)):
        add_video(folder, step, b"0" * size)
    page = render(Watch(tmp_path)).decode()
    assert len(page) < 20_000_000
    assert EVIL not in page
    assert "\\u003cimg" in page
    assert page.count("</script>") == 2
    assert page.count("data:video/mp4;base64,") == 2  # the two latest that fit
    links = page.replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in links
    assert "https://" not in links
    for _ in range(2):  # a report replaces an earlier one
        assert main(["report", str(tmp_path), f"out={tmp_path / 'page.html'}"]) == 0
        assert "wrote" in capsys.readouterr().out
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    assert main(["report", str(tmp_path), f"out={tmp_path / 'mine.html'}"]) == 2
    assert "exists, and this command did not write it" in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "{}/none"], "error: {}/none: is not a folder"),
        (["watch", "{}"], "error: {}: contains no run"),
        (["report", "{}/run", "out={}/a.txt"], "error: out: '{}/a.txt' is not the name of an .html file"),
        (["watch", "{}/run", "port=70000"], "error: port: 70000 is wrong"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, capsys, words: list[str], message: str) -> None:
    if "run" in " ".join(words[1:2]):
        make(tmp_path / "run", row(1))
    assert main([word.format(tmp_path) for word in words]) == 2
    assert capsys.readouterr().err.startswith(message.format(tmp_path))


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "run", row(1))
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"watch: needs packages .*pip install 'anyflow_train\[web\]'"):
        application(Watch(tmp_path))


def in_chromium(url: str, folder: Path, picture: Path | None = None) -> str:
    """Open a page in headless Chromium. Returns its document after its program ran."""
    assert CHROMIUM
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--virtual-time-budget=8000",
    ]
    options += [f"--user-data-dir={folder / 'profile'}", "--window-size=1280,1600"]
    wanted = ["--dump-dom"] if picture is None else [f"--screenshot={picture}"]
    command = [CHROMIUM, *options, *wanted, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.nightly
@needs_a_browser
def test_a_browser_shows_runs_and_no_name_becomes_a_tag(tmp_path: Path) -> None:
    import uvicorn

    lines = "".join(row(step) for step in range(1, 300)) + validation(100) + validation(200)
    first = make(tmp_path / "runs" / EVIL, lines, optimizer={"lr": 1})
    make(tmp_path / "runs" / "other", lines, optimizer={"lr": 2})
    add_video(first, 200)
    report = tmp_path / "page.html"
    report.write_bytes(render(Watch(tmp_path / "runs")))
    config = uvicorn.Config(application(Watch(tmp_path / "runs")), host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        pages = [in_chromium(f"http://127.0.0.1:{port}/", tmp_path), in_chromium(report.as_uri(), tmp_path)]
    finally:
        server.should_exit = True
        thread.join(10)
    for page in pages:
        assert 'data-ready="yes"' in page
        body = page.split("<main>")[1].split("</main>")[0]
        assert body.count("<path") >= 8
        assert body.count("<video") == 1
        assert "optimizer.lr" in body
        assert "<img" not in body
        loss = re.findall(r"<text[^>]*>([^<]+)</text>", body.split('aria-label="Loss"')[1].split("</svg>")[0])
        assert loss == ["0.01", "0.1", "1", "100", "200", "step"]  # 1 / step, 299 steps
        assert "&lt;img src=x" in body
