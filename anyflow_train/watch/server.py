"""`anyflow watch RUNS`: a local page over run directories. It only reads, and only this machine can open it."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anyflow_train.config.commands import WatchConfig
from anyflow_train.errors import UserError, requires_extra
from anyflow_train.watch.runs import Watch

STATIC = Path(__file__).parent / "static"
CLOSING_SECONDS = 1
"""Time that open pages have to close their connections after Ctrl-C."""
HOST, HOSTS = "127.0.0.1", ["127.0.0.1", "localhost"]
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; media-src 'self'; img-src 'self'"
FILES = {"/": "index.html", "/app.js": "app.js", "/style.css": "style.css"}


def run(config: WatchConfig) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: there are no runs, the port is in use, or the extra `web` is not installed.
    """
    serve(application(Watch(Path(config.runs))), config.port)


def serve(app: Any, port: int, at_end: Callable[[], None] = lambda: None) -> None:
    """Serve a web application on this machine alone, until Ctrl-C, which calls `at_end` first.

    Raises:
        UserError: the port is in use.
    """
    import uvicorn

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError("port", f"{port} cannot be used ({error.strerror}); give another one") from None
        print(f"http://{HOST}:{probe.getsockname()[1]}/  (Ctrl-C ends it)", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=CLOSING_SECONDS))
        end = server.handle_exit

        def end_quietly(sig: int, frame: Any) -> None:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # open pages are cut off, which is no error
            at_end()
            end(sig, frame)

        server.handle_exit = end_quietly
        server.run(sockets=[probe])


def application(watch: Watch) -> Any:
    """Make the web application of a folder of runs.

    Requests whose Host header names another machine are refused, so that no page of the web can read the runs.

    Raises:
        UserError: the extra `web` is not installed.
    """
    with requires_extra("watch", "web"):
        import uvicorn  # noqa: F401  # both packages are one extra
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.responses import FileResponse, JSONResponse, Response
        from starlette.routing import Route
    lock = threading.Lock()
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}

    def static(request: Any) -> Response:
        return FileResponse(STATIC / FILES[request.url.path], headers=headers)

    def state(request: Any) -> Response:
        after = request.query_params.get("after", "0")
        with lock:
            return JSONResponse(watch.state(int(after) if after.isdecimal() else 0), headers=headers)

    def video(request: Any) -> Response:
        run, step = watch.runs.get(request.query_params.get("run", "")), request.query_params.get("step", "")
        try:
            if run is None or not step.isdecimal():
                raise FileNotFoundError
            return FileResponse(run.video(int(step)), media_type="video/mp4", headers=headers)
        except OSError:
            return Response("there is no such video", 404, headers=headers)

    routes = [*(Route(path, static) for path in FILES), Route("/api/state", state), Route("/api/video", video)]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)])
