"""`anyflow export`: writes a checkpoint as a folder that stock diffusers loads without this package."""

from __future__ import annotations

from pathlib import Path

from anyflow_train.config.commands import ExportConfig
from anyflow_train.errors import UserError
from anyflow_train.export.card import model_card, validated
from anyflow_train.export.folder import check_writable, new_folder, write_marker
from anyflow_train.export.formats import FORMATS, Job
from anyflow_train.export.provenance import Provenance, public_config, public_name
from anyflow_train.export.push import is_same_export, push
from anyflow_train.training.checkpoints.reading import read_network, read_step, resolve_checkpoint
from anyflow_train.training.checkpoints.run_directory import runs_of_sweep
from anyflow_train.training.networks import load_trained_network
from anyflow_train.training.reporting.tasks import TaskProgress
from anyflow_train.training.weight_source import base_of


def run(config: ExportConfig) -> None:
    """Write the folder, reload it, and compare. The folder appears only if the outputs agree. Upload it if asked to.

    The folder of a sweep is exported as one folder per finished run.

    Raises:
        UserError: there is no such checkpoint, it does not fit the format, or the folder must not be written.
        WrongExport: the written files do not have the outputs of the trained model.
    """
    out = Path(config.out).expanduser()
    if runs := runs_of_sweep(config.model):
        if config.push is not None:
            raise UserError("push", f"uploads one model, but '{config.model}' is a sweep of {len(runs)} runs; name one")
        for one in runs:
            run(config.model_copy(update={"model": str(one), "out": str(out / one.name)}))
        return
    check_writable(out, config.overwrite or config.push is not None)
    checkpoint = resolve_checkpoint(config.model)
    if config.push is None or not is_same_export(out, config, checkpoint):
        _write(config, checkpoint, out)
    if config.push is not None:
        push(out, config.push, config.private)


def _write(config: ExportConfig, checkpoint: Path, out: Path) -> None:
    with TaskProgress("loading", 2, config.log) as progress, new_folder(out, config.overwrite) as folder:
        trained, step = read_network(checkpoint), read_step(checkpoint)
        what = f"{trained.run}, step {step}, {config.weights} weights"
        progress.say(f"exporting {what}, as {config.format} in {config.precision}")
        network = load_trained_network(checkpoint, config.weights)
        progress.advance()
        progress.phase("writing and checking")
        result = FORMATS[config.format](Job(config, checkpoint, trained, network, folder))
        source, saved = base_of(trained), public_config(checkpoint)
        base = public_name(source)
        facts = (config, trained, saved, checkpoint.name, step, base, result.difference, source, result.lost)
        provenance = Provenance(*facts)
        (folder / "README.md").write_text(model_card(provenance, validated(checkpoint, step)))
        write_marker(folder, provenance.to_json())
        progress.advance()
    progress.result(f"checked: its outputs differ from the trained model by {result.difference:.1e} (relative)")
    if result.lost is not None:
        progress.result(
            f"adapters of rank {config.rank} lose {result.lost:.1%} of what was trained (root mean square of weights)"
        )
    progress.result(f"wrote {out}")
