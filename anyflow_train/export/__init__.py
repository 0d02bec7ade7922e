"""`anyflow export`."""

from anyflow_train.export.command import run as run
