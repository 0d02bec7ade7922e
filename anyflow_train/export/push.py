"""Upload of an export to the Hugging Face Hub."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from anyflow_train.config.commands import ExportConfig
from anyflow_train.errors import UserError, reason_of
from anyflow_train.export.folder import MARKER
from anyflow_train.export.provenance import CONTENT
from anyflow_train.files import read_json
from anyflow_train.training.checkpoints.reading import read_network, read_step


def push(folder: Path, repository: str, private: bool) -> None:
    """Upload a folder to a model repository, which is made if it does not exist.

    Files that the repository already has are not sent again, so an upload that was interrupted goes on with the file
    that it was at.

    Args:
        folder: an export.
        repository: owner/name.
        private: whether a new repository is private. An existing one stays as it is.

    Raises:
        UserError: there is no token, or the hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError("push", "is not possible with HF_HUB_OFFLINE=1; unset it and run the same line again")
    if get_token() is None:
        raise UserError("push", "needs a token of the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    visible = "private" if private else "public"
    print(f"uploading {len(files)} files, {total / 2**30:.2f} GiB, to {repository} ({visible}):")
    for path in files:
        print(f"  {path.relative_to(folder).as_posix()}  {path.stat().st_size / 2**20:.1f} MiB")
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        found = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by anyflow_train")
    except (OSError, ValueError) as error:
        again = f"the export is complete in {folder}; run the same line again to go on"
        raise UserError("push", f"{repository} could not be uploaded ({reason_of(error)}); {again}") from error
    print(f"uploaded: {found.commit_url}")


def is_same_export(folder: Path, config: ExportConfig, checkpoint: Path) -> bool:
    """Whether a folder already holds the export of this checkpoint with these settings."""
    with suppress(OSError, ValueError, TypeError):
        marker = read_json(folder / MARKER)
        wanted = {"run": read_network(checkpoint).run, "step": read_step(checkpoint)}
        wanted |= config.model_dump(mode="json", include=CONTENT)
        return all(marker.get(name) == value for name, value in wanted.items())
    return False
