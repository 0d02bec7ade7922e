"""Videos of one network are told from those of another."""

from pathlib import Path

from anyflow_train.evaluation.load import load_model
from anyflow_vbench.folder import digest
from tests.export.runs import FULL, make_run


def test_a_digest_is_of_the_weights_and_of_the_config(tmp_path: Path):
    run = str(make_run(tmp_path / "run", FULL))
    other_gate = str(make_run(tmp_path / "other", FULL, gate=0.5))  # with the same weights
    averaged = digest(load_model(run, "ema").network)
    assert averaged == digest(load_model(run, "ema").network)
    assert averaged != digest(load_model(run, "raw").network)
    assert averaged != digest(load_model(other_gate, "ema").network)
