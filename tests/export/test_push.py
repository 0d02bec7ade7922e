"""`push=owner/name` uploads an export to a hub: here a server of this process, reached through HF_ENDPOINT."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from anyflow_train.config.commands import ExportConfig
from anyflow_train.errors import UserError
from anyflow_train.export import run
from tests.export.runs import FULL, make_run


class Hub:
    """A model hub that keeps what it is sent."""

    def __init__(self) -> None:
        self.made: dict = {}
        self.files: dict[str, bytes] = {}
        self.refuse = False
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def answer(self, value: object, code: int = 200) -> None:
                content = json.dumps(value).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                hub.paths.append(self.path)
                self.answer(
                    {"siblings": [], "sha": "0", "id": "owner/name", "private": True, "tags": [], "downloads": 0}
                )

            def do_POST(self) -> None:
                hub.paths.append(self.path)
                assert self.headers["authorization"] == "Bearer hf_secret"
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                if self.path == "/api/repos/create":
                    hub.made = json.loads(body)
                    self.answer({"url": f"{hub.url}/owner/name"})
                elif "/preupload/" in self.path:
                    files = [file["path"] for file in json.loads(body)["files"]]
                    answers = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in files]
                    self.answer({"files": answers})
                elif "/commit/" in self.path and hub.refuse:
                    self.answer({"error": "storage is full"}, 507)
                elif "/commit/" in self.path:
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    self.answer({"success": True, "commitOid": "1", "commitUrl": f"{hub.url}/owner/name/commit/1"})
                else:
                    self.answer({})

        self.paths: list[str] = []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants, hf_api

    hub = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(hf_api.constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def config(folder: Path, **options: object) -> ExportConfig:
    trained = folder / "run"
    if not trained.exists():
        make_run(folder, FULL)
    own = {"model": str(trained), "out": str(folder / "out"), "format": "transformer", "push": "owner/name"}
    return ExportConfig.model_validate({**own, **options})


def test_an_export_is_uploaded_as_a_private_repository(tmp_path: Path, hub: Hub, capsys) -> None:
    run(config(tmp_path))
    assert hub.made["name"] == "name"
    assert hub.made["organization"] == "owner"
    assert hub.made.get("private", hub.made.get("visibility") == "private")
    sent = {
        path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in (tmp_path / "out").rglob("*.*")
    }
    assert hub.files == sent
    assert 'from_pretrained("owner/name"' in hub.files["README.md"].decode()
    assert str(tmp_path) not in hub.files["README.md"].decode()
    said = capsys.readouterr().out
    assert "uploading 4 files" in said
    assert "(private)" in said
    assert "README.md" in said


def test_an_upload_that_failed_goes_on_by_the_same_line(tmp_path: Path, hub: Hub, capsys) -> None:
    hub.refuse = True
    with pytest.raises(UserError, match=r"push: owner/name could not be uploaded .*run the same line again"):
        run(config(tmp_path))
    hub.refuse = False
    written = (tmp_path / "out" / "README.md").stat().st_mtime_ns
    run(config(tmp_path))
    assert hub.files
    assert (tmp_path / "out" / "README.md").stat().st_mtime_ns == written  # nothing is exported again


def test_another_export_in_the_folder_is_not_uploaded(tmp_path: Path, hub: Hub) -> None:
    run(config(tmp_path, push=None))
    # Without `push`, the card may name folders of this machine.
    for options in ({}, {"precision": "fp32"}):
        with pytest.raises(UserError, match="holds an earlier export"):
            run(config(tmp_path, **options))
    assert not hub.files
    run(config(tmp_path, overwrite=True))
    assert str(tmp_path) not in hub.files.pop("README.md").decode()
    run(config(tmp_path, overwrite=True, license="mit"))
    assert "license: mit" in hub.files["README.md"].decode()


def test_an_upload_needs_a_token(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="push: needs a token"):
        run(config(tmp_path))


def test_offline_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="push: is not possible with HF_HUB_OFFLINE=1"):
        run(config(tmp_path))
