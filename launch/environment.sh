# The other scripts source this file. It finds Python, creates .venv once, and installs the package into it.
# Usage: prepare_environment [EXTRA]. Afterwards `python` and `anyflow` are those of the environment.

fail() {
  echo "error: $*" >&2
  exit 2
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "Python 3.11 or newer is needed, and none was found on PATH (set PYTHON=/path/to/python3.11)"
}

prepare_environment() {
  local extra=${1:-} target stamp wanted
  target=".${extra:+[$extra]}"
  stamp=".venv/installed${extra:+-$extra}"
  wanted="$(cksum <pyproject.toml) $PWD"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    local python
    python=$(find_python) || exit 2
    if [ ! -x .venv/bin/python ]; then
      "$python" -c 'import ensurepip, venv' 2>/dev/null \
        || fail "$python has no venv module (on Debian and Ubuntu: apt-get install python3-venv)"
      echo "Making .venv with $("$python" --version)"
      "$python" -m venv .venv || fail "could not make .venv in $PWD"
    fi
    echo "Installing anyflow_train${extra:+ with its $extra extras} (once; some minutes where torch must be downloaded)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$target" \
      || fail "the installation failed: see pip's message above (it needs a network or a package index, and about 3 GB of disk)"
    echo "$wanted" >"$stamp"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}
