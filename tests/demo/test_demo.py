"""`anyflow demo`: its clips are those of `anyflow sample`, it stops between calls, and a browser can use it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anyflow_train.__main__ import main
from anyflow_train.commands import sample
from anyflow_train.config.commands import DemoConfig, SampleConfig
from anyflow_train.demo import command
from anyflow_train.demo.play import Player, Stage, Stopped, Wish, check_picture, load
from anyflow_train.errors import UserError
from anyflow_train.evaluation.sampling import Watched
from anyflow_train.evaluation.video import write_mp4
from tests.browser import Browser, needs_a_browser
from tests.export.runs import CHUNKS, FULL, LORA, TINY_WAN, make_run

SMALL = {"precision": "fp32", "text_length": 16, "device": "cpu"}


def never(player: Player, number: int) -> None:
    """Let every call be made."""


def test_its_clips_are_those_of_sample(tmp_path: Path) -> None:
    trained, written = make_run(tmp_path, LORA), list[np.ndarray]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "write_mp4", lambda path, frames, fps: written.append(frames))
        options = {"prompts": ("a red ball",), "calls": (2,), "seeds": (3, 4), **SMALL}
        sample.run(SampleConfig(model=str(trained), out=str(tmp_path / "out"), **options))
    stage = load(DemoConfig(model=str(trained), teacher=str(tmp_path / "base"), **SMALL))
    clips = list(stage.play(Wish("a red ball", (2, 3), range(3, 5)), never))
    assert [(clip.player, clip.seed, clip.calls) for clip in clips] == [
        ("run", 3, 2), ("base (teacher)", 3, 3), ("run", 4, 2), ("base (teacher)", 4, 3)
    ]  # fmt: skip
    assert all(np.array_equal(clip.frames, frames) for clip, frames in zip(clips[::2], written, strict=True))
    assert not np.array_equal(clips[1].frames, clips[0].frames)
    assert all(clip.seconds > 0 for clip in clips)


def test_it_stops_before_the_next_call_and_can_be_used_again(tmp_path: Path) -> None:
    stage, made = load(DemoConfig(model=str(make_run(tmp_path, FULL, causal=CHUNKS)), **SMALL)), list[int]()

    def before_call(player: Player, number: int) -> None:
        if len(made) == 3:
            raise Stopped
        made.append(number)

    with pytest.raises(Stopped):
        list(stage.play(Wish("a red ball", (2, 2), range(9)), before_call))
    assert made == [0, 0, 0]
    made.clear()
    frame = tmp_path / "frame.png"
    Image.fromarray(np.full((40, 50, 3), 200, np.uint8)).save(frame)
    wish = Wish("a red ball", (1, 1), range(1), frame)
    (clip,) = stage.play(wish, lambda player, number: made.append(number))
    assert made == [0, 0]  # the first of three chunks is the image
    (free,) = stage.play(replace(wish, file=None), never)
    assert not np.array_equal(clip.frames, free.frames)


def test_a_file_is_checked_before_it_is_decoded(tmp_path: Path) -> None:
    text, large = tmp_path / "a.mp4", tmp_path / "large.png"
    text.write_text("#EXTM3U\nhttp://127.0.0.1/secret")
    Image.new("1", (9000, 9000)).save(large)
    for path, problem in ((text, "cannot be read as an image or a video"), (large, "its pictures have 81000000")):
        with pytest.raises(UserError, match=problem) as caught:
            check_picture(path)
        assert str(tmp_path) not in str(caught.value)


def test_a_teacher_that_does_not_fit_is_named(tmp_path: Path) -> None:
    trained = make_run(tmp_path, FULL, architecture={"text_dim": 32})
    with pytest.raises(UserError, match=r"teacher: .* has text_dim=64, but run has 32"):
        load(DemoConfig(model=str(trained), teacher=str(TINY_WAN), **SMALL))


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "anyflow_train.demo.page", raising=False)
    assert main(["demo", str(TINY_WAN)]) == 2
    problem = "needs packages that are not installed: pip install 'anyflow_train[demo]'"
    assert capsys.readouterr().err == f"error: demo: {problem}\n"


@contextmanager
def served(stage: Stage, folder: Path) -> Iterator[str]:
    """Serve the page of a stage on a free port, and yield its address."""
    import uvicorn

    app = command.import_page(str(folder / "uploads")).application(stage, {})
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(20)


def counted(stage: Stage, seconds: float = 0.05) -> tuple[Stage, list[int]]:
    """Count the network calls of a stage, and make each take so much longer."""
    calls: list[int] = []

    def count(_: int) -> None:
        calls.append(1)
        time.sleep(seconds)

    def player(one: Player) -> Player:
        return replace(one, maker=replace(one.maker, flow_map=Watched(one.maker.flow_map, count)))

    return replace(stage, players=tuple(map(player, stage.players))), calls


STATUS = "document.querySelector('#status textarea').value"
READY = " && ".join(
    f"document.querySelector('{one}')" for one in ("#prompt textarea", "#make", "#stop", "#status textarea")
)
VIDEOS = "[...document.querySelectorAll('#shown video')]"


@pytest.mark.nightly
@needs_a_browser
def test_a_browser_compares_with_the_teacher_and_stops(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    stage, calls = counted(load(DemoConfig(model=str(TINY_WAN), teacher=str(TINY_WAN), **SMALL)))
    with served(stage, tmp_path) as url, Browser(url) as browser:
        browser.wait(READY)
        assert not browser.run("document.querySelector('#file')")  # this model cannot continue a file
        browser.run("document.querySelector('#make').click()")
        browser.wait(f"{STATUS} == 'prompt: is empty; write what the clip shows'")
        browser.type("#prompt textarea", "a red ball moving left <img src=x onerror=alert(1)>")
        browser.run("document.querySelector('#make').click()")
        browser.wait(f"{STATUS} == '2 clips' && {VIDEOS}.length == 2")
        assert len(calls) == 4 + 50
        browser.wait(f"{VIDEOS}.every(one => one.readyState >= 2 && one.videoWidth == 64)")
        heads = browser.run("[...document.querySelectorAll('#shown h3')].map(one => one.textContent)")
        assert heads == ["tiny-wan", "tiny-wan (teacher)"]
        captions = browser.run("[...document.querySelectorAll('#shown figcaption')].map(one => one.textContent)")
        assert [caption.rsplit(",", 1)[0] for caption in captions] == ["seed 0, 4 calls", "seed 0, 50 calls"]
        browser.screenshot(tmp_path / "page.png")
        calls.clear()
        browser.run("document.querySelector('#make').click()")
        browser.wait(f"{VIDEOS}.length == 1")
        browser.run("document.querySelector('#stop').click()")
        browser.wait(f"{STATUS} == 'stopped after 1 of 2 clips'")
        made = len(calls)
        assert made < 54
        time.sleep(0.5)
        assert len(calls) == made
        assert browser.errors == []
        others = [one for one in browser.requests if not one.startswith((url, "data:", "blob:"))]
        assert others == []


@pytest.mark.nightly
@needs_a_browser
def test_a_page_that_waits_can_be_stopped(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    stage, calls = counted(load(DemoConfig(model=str(TINY_WAN), teacher=str(TINY_WAN), **SMALL)), 0.3)
    with served(stage, tmp_path) as url, Browser(url) as one, Browser(url) as other:
        for browser in (one, other):
            browser.wait(READY)
            browser.type("#prompt textarea", "a red ball moving left")
        for browser in (one, other):
            browser.run("document.querySelector('#make').click()")
            browser.wait(f"{STATUS}.length > 0")
        assert other.run(STATUS) == "waiting"
        other.run("document.querySelector('#stop').click()")
        one.wait(f"{STATUS} == '2 clips'")
        other.wait(f"{STATUS} == 'stopped after 0 of 2 clips'")
        assert len(calls) == 4 + 50
        other.run("document.querySelector('#make').click()")
        other.wait(f"{STATUS} == '2 clips'")


@pytest.mark.nightly
@needs_a_browser
def test_ctrl_c_ends_it_before_the_clip_is_made(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    options = ["port=0", "guidance_scale=3", "text_length=16", "precision=fp32", "frames=81", "height=128", "width=128"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "anyflow_train", "demo", str(TINY_WAN), *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    url = process.stdout.readline().split()[0]
    with Browser(url) as browser:
        browser.wait(READY)
        browser.run("document.querySelector('#calls input[type=number]').focus()")
        browser.run("document.querySelector('#calls input[type=number]').select()")
        browser.send("Input.insertText", text="50")
        browser.type("#prompt textarea", "a red ball")
        browser.run("document.querySelector('#make').click()")
        browser.wait("document.querySelector('#status').innerText.includes('call 2')")
        begun = time.monotonic()
        browser.wait("document.querySelector('#status').innerText.includes('call 5')")
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
        taken = time.monotonic() - start
    assert process.stderr is not None
    assert process.stderr.read() == "interrupted\n"
    assert taken < (start - begun) / 3 * 30 + 5  # 45 of 50 calls are left
    assert not list(tmp_path.glob("anyflow-demo-*"))


@pytest.mark.nightly
@needs_a_browser
def test_a_browser_continues_a_video_with_a_run(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    import httpx

    stage, calls = counted(load(DemoConfig(model=str(make_run(tmp_path, FULL, causal=CHUNKS)), **SMALL)))
    clip, text = tmp_path / "clip.mp4", tmp_path / "text.mp4"
    write_mp4(clip, np.full((9, 48, 64, 3), 200, np.uint8), 16)
    text.write_text("#EXTM3U\nhttp://127.0.0.1/secret")
    with served(stage, tmp_path) as url, Browser(url) as browser:
        browser.wait("document.querySelector('#file input[type=file]')")
        assert browser.run("document.body.innerText.includes('teacher')") is False
        browser.type("#prompt textarea", "a red ball")
        for path, ends in ((clip, "1 clip"), (text, "file: cannot be read as an image or a video")):
            browser.upload("#file input[type=file]", path)
            browser.wait(f"document.querySelector('#file').innerText.includes('{path.stem}')")
            browser.run("document.querySelector('#make').click()")
            browser.wait(f"{STATUS}.startsWith('{ends}')")
            browser.screenshot(tmp_path / f"{path.stem}.png")
            browser.run("document.querySelector('#file button[aria-label=Clear]')?.click()")
            browser.wait("document.querySelector('#file input[type=file]')")
        assert len(calls) == 4  # two chunks of three are the video's; the last one takes all calls
        assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 400
        assert "default-src 'self'" in httpx.get(url).headers["content-security-policy"]
        for path in ("gradio_api/file=/etc/hostname", f"gradio_api/file={tmp_path}/base/vae/config.json"):
            assert httpx.get(url + path).status_code in (403, 404)
