"""`anyflow export`: writes a checkpoint as a folder that stock diffusers loads without this package."""

from __future__ import annotations

from pathlib import Path

from anyflow_train.config.commands import ExportConfig
from anyflow_train.export.card import model_card
from anyflow_train.export.folder import new_folder, write_marker
from anyflow_train.export.formats import FORMATS, Job
from anyflow_train.export.provenance import Provenance, public_config, public_name
from anyflow_train.training.checkpoints.reading import read_network, read_step, resolve_checkpoint
from anyflow_train.training.networks import load_trained_network
from anyflow_train.training.weight_source import base_of


def run(config: ExportConfig) -> Provenance:
    """Write the folder, reload it with stock diffusers, and compare. The folder appears only if the outputs agree.

    Raises:
        UserError: there is no such checkpoint, it does not fit the format, or the folder must not be written.
        WrongExport: the written files do not have the outputs of the trained model.
    """
    out = Path(config.out).expanduser()
    with new_folder(out, config.overwrite) as folder:
        checkpoint = resolve_checkpoint(config.checkpoint)
        network = load_trained_network(checkpoint, config.weights)
        trained, step = read_network(checkpoint), read_step(checkpoint)
        what = f"{trained.run}, step {step}, {config.weights} weights"
        print(f"exporting {what}, as {config.format} in {config.precision}")
        difference = FORMATS[config.format](Job(config, checkpoint, trained, network, folder))
        base, saved = public_name(base_of(trained)), public_config(checkpoint)
        provenance = Provenance(config, trained, saved, checkpoint.name, step, base, difference)
        (folder / "README.md").write_text(model_card(provenance))
        write_marker(folder, provenance.to_json())
    print(f"checked with stock diffusers: its outputs differ from the trained model by {difference:.1e} (relative)")
    print(f"wrote {out}")
    return provenance
