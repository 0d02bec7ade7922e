"""The page of `anyflow demo`. Importing this module requires the extra `demo`."""

from __future__ import annotations

import base64
import html
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]  # an extra
import torch
from fastapi import FastAPI  # pyright: ignore[reportMissingImports]  # comes with gradio
from starlette.middleware.trustedhost import TrustedHostMiddleware

from anyflow_train.demo.play import Clip, Player, Stage, Stopped, Wish
from anyflow_train.errors import UserError
from anyflow_train.evaluation.low_memory import free_cache
from anyflow_train.evaluation.video import write_mp4
from anyflow_train.text import calls as call_count
from anyflow_train.watch.server import HOSTS

MOST_CALLS, MOST_CLIPS, MOST_UPLOAD = 50, 8, "200mb"
# gradio's page builds functions from texts; nothing may come from, or go to, another machine.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "frame-ancestors 'self'; form-action 'self'"
)
CSS = """
.clips {display: grid; gap: 12px 16px; align-items: start}
.clips h3 {margin: 0; font-size: 1rem}
.clips figure {margin: 0}
.clips video {width: 100%; background: #000; border-radius: 6px; image-rendering: auto}
.clips figcaption {font-size: 0.85rem; opacity: 0.75; padding-top: 2px}
"""


def application(stage: Stage, stops: dict[str, threading.Event]) -> Any:
    """Make the web application. Requests whose Host header names another machine are refused.

    Args:
        stage: makes the clips.
        stops: becomes the event of each open page that stops its sampling.
    """
    app = FastAPI(openapi_url=None)
    app.add_middleware(Headers)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)
    font = ["system-ui", "sans-serif"]
    theme = gr.themes.Base(primary_hue="teal", font=font, font_mono=["ui-monospace", "monospace"])
    options = {"max_file_size": MOST_UPLOAD, "ssr_mode": False, "mcp_server": False, "footer_links": ["settings"]}
    return gr.mount_gradio_app(app, build(stage, stops), path="/", theme=theme, css=CSS, **options)


class Headers:
    """Adds the content security policy to each answer.

    Args:
        app: the application that answers.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]
                message = message | {"headers": [*message["headers"], *more]}
            await send(message)

        await self._app(scope, receive, with_policy)


def build(stage: Stage, stops: dict[str, threading.Event]) -> gr.Blocks:
    """Build the page of a model, with its teacher if it has one."""
    model, *teachers = stage.players

    def begin(request: gr.Request) -> str:
        """Make the event that stops this page's sampling, also while another page has the device."""
        session = str(request.session_hash)
        if session not in stops or stops[session].is_set():
            stops[session] = threading.Event()
        return "waiting"

    def make(
        prompt: str,
        calls: float,
        teachers_calls: float,
        seed: float | None,
        clips: float,
        file: str | None,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  # gradio finds it by this default
    ) -> Iterator[Any]:
        """Make the clips, and show each one when it is ready."""
        stop = stops[str(request.session_hash)]
        counts, first = (int(calls), int(teachers_calls)), 0 if seed is None else int(seed)
        wish = Wish(prompt.strip(), counts, range(first, first + int(clips)), Path(file) if file else None)
        total, figures, current = len(wish.seeds) * len(stage.players), dict[tuple[int, str], str](), [0]

        def before_call(player: Player, number: int) -> None:
            if stop.is_set():
                raise Stopped
            current[0] += 1
            whole = counts[stage.players.index(player)] * player.chunks
            share = (len(figures) + min((current[0] - 1) / whole, 1)) / total
            progress(share, f"clip {number + 1} of {len(wish.seeds)}, {player.name}: call {current[0]}")

        says = f"{total} clip{'s' * (total != 1)}"
        try:
            if not wish.prompt:
                raise UserError("prompt", "is empty; write what the clip shows")
            yield show(stage.players, figures), "starting"
            for clip in stage.play(wish, before_call):
                figures[clip.seed, clip.player] = _figure(clip, stage.fps)
                current[0] = 0
                yield show(stage.players, figures), f"{len(figures)} of {total} clips"
        except Stopped:
            says = f"stopped after {len(figures)} of {total} clips"
        except UserError as error:
            says = str(error)
        except torch.OutOfMemoryError:
            says = "the GPU does not have enough memory for clips of this size; start the demo with smaller ones"
        finally:
            free_cache()
        yield show(stage.players, figures), says

    def stop(request: gr.Request) -> None:
        """Stop the sampling of this page before its next network call."""
        if (event := stops.get(str(request.session_hash))) is not None:
            event.set()

    size = stage.shape.size
    with gr.Blocks(analytics_enabled=False, title=f"{model.name} - anyflow demo", fill_width=True) as page:
        gr.Markdown(
            f"## {_plain(model.name)}\n{size.frames} frames of {size.width} x {size.height} on {stage.codec.device}"
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                prompt = gr.Textbox(label="prompt", lines=2, elem_id="prompt")
                calls = gr.Slider(1, MOST_CALLS, value=4, step=1, label="network calls", elem_id="calls")
                label = "network calls of the teacher"
                taught = gr.Slider(1, MOST_CALLS, value=MOST_CALLS, step=1, label=label, visible=bool(teachers))
                clips = gr.Slider(1, MOST_CLIPS, value=1, step=1, label="clips", elem_id="clips")
                seed = gr.Number(0, label="seed of the first clip", precision=0, minimum=0, maximum=2**31 - 1)
                label = "image or video to continue (optional)"
                if any(not teacher.continues for teacher in teachers):
                    label = f"{label[:-1]}; the teacher generates all frames)"
                kinds = ["image", "video"]
                file = gr.File(label=label, file_types=kinds, visible=model.continues, elem_id="file", height=120)
                with gr.Row():
                    go = gr.Button("Make", variant="primary", elem_id="make", min_width=80)
                    halt = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80)
            with gr.Column(scale=3):
                status = gr.Textbox(label="status", interactive=False, elem_id="status")
                shown = gr.HTML(show(stage.players, {}), elem_id="shown")
        inputs, outputs = [prompt, calls, taught, seed, clips, file], [shown, status]
        options = {"concurrency_limit": 1, "concurrency_id": "device", "api_visibility": "private"}
        asked = gr.on(
            [go.click, prompt.submit], begin, None, status, trigger_mode="once", queue=False, api_visibility="private"
        )
        asked.then(make, inputs, outputs, trigger_mode="once", show_progress_on=status, **options)
        halt.click(stop, queue=False, api_visibility="private")
        page.unload(stop)
    return page


def show(players: Sequence[Player], figures: Mapping[tuple[int, str], str]) -> str:
    """Show clips as HTML: one column per network, one row per seed.

    Args:
        players: the networks.
        figures: (seed, name of the network) -> HTML of the clip.
    """
    cells = [f"<h3>{html.escape(player.name)}</h3>" for player in players]
    for seed in dict.fromkeys(seed for seed, _ in figures):
        cells += [figures.get((seed, player.name), "<figure></figure>") for player in players]
    columns = f"grid-template-columns: repeat({len(players)}, minmax(0, 420px))"
    return f'<div class="clips" style="{columns}">{"".join(cells)}</div>'


def _figure(clip: Clip, fps: float) -> str:
    caption = f"seed {clip.seed}, {call_count(clip.calls)}, {clip.seconds:.2f} s"
    return (
        f'<figure><video src="{_data_url(clip, fps)}" autoplay loop muted playsinline controls></video>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _data_url(clip: Clip, fps: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, clip.frames, fps)
        return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _plain(text: str) -> str:
    """Escape a name for Markdown."""
    return "".join(f"\\{char}" if char in r"\`*_{}[]<>()#+-.!|$" else char for char in text)
