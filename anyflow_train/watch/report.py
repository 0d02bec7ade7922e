"""`anyflow report RUN out=report.html`: the page of `anyflow watch` as one file that needs no network."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from anyflow_train.config.commands import ReportConfig
from anyflow_train.errors import UserError
from anyflow_train.files import check_own, replace_file
from anyflow_train.watch.runs import Watch
from anyflow_train.watch.server import STATIC

DATA = '<script type="application/json" id="data">'
"""Beginning of the data in a report, by which an earlier report is known."""
MOST_BYTES = 19_000_000
"""Size of the file. Videos of the latest validations come first; what does not fit is left out."""


def run(config: ReportConfig) -> None:
    """Write the file.

    Raises:
        UserError: there is no run, or the file cannot be written, or it exists and is no report.
    """
    out = Path(config.out).expanduser()
    if out.suffix != ".html" or out.is_dir():
        raise UserError("out", f"'{config.out}' is not the name of an .html file; give out=report.html")
    check_own(out.parent, DATA, out.name)
    page = render(Watch(Path(config.run)))
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, page)
    print(f"wrote {out} ({len(page) / 1e6:.1f} MB)")


def render(watch: Watch) -> bytes:
    """Make the page with its data, styles, program and videos inside."""
    state: dict[str, Any] = watch.state()
    room = MOST_BYTES - len(_script(state)) - sum(path.stat().st_size for path in STATIC.iterdir())
    latest = sorted(((step, name) for name, run in watch.runs.items() for step in run.videos()), reverse=True)
    state["embedded"] = {}
    for step, name in latest:
        data = watch.runs[name].video(step).read_bytes()
        if len(data) * 4 // 3 + 1000 < room:
            room -= len(data) * 4 // 3 + 1000
            state["embedded"][f"{name} {step}"] = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    for name, run in state["runs"].items():
        run["videos"] = [step for step in run["videos"] if f"{name} {step}" in state["embedded"]]
    style, program = ((STATIC / name).read_text(encoding="utf-8") for name in ("style.css", "app.js"))
    data = f"{DATA}{_script(state)}</script><script>{program}</script>"
    page = (STATIC / "index.html").read_text(encoding="utf-8").replace('<script src="app.js" defer></script>', "")
    page = page.replace('<link rel="stylesheet" href="style.css">', f"<style>{style}</style>")
    return page.replace("</body>", f"{data}</body>").encode()


def _script(value: Any) -> str:
    """Format JSON for the inside of a script element, which no text in it can end."""
    return json.dumps(value).replace("<", "\\u003c")
