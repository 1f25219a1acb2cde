#!/usr/bin/env bash
# Run the golden answers as a device does: the wheel under Python 3.8, NumPy 1.19 and ONNX Runtime 1.10, from Python
# and by the verbs. Skipped, with a line that says so, where no Python 3.8 is found: set OFFRAMP_PYTHON38 to name one.
set -euo pipefail
cd "$(dirname "$0")/.."

python38() {
  local candidate
  for candidate in "${OFFRAMP_PYTHON38:-}" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.8.*/bin/python python3.8; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 8))' 2> /dev/null
    then
      command -v "$candidate"
      return
    fi
  done
}

python="$(python38)"
if [ -z "$python" ]; then
  echo "device: SKIPPED: no Python 3.8 (install it with pyenv, or set OFFRAMP_PYTHON38)"
  exit 0
fi
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
build="${1:-python3}" # a Python of at least 3.10 with pip; it builds the wheel
"$build" -m pip wheel --quiet --no-deps --wheel-dir "$folder/dist" .
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --only-binary :all: \
  -c constraints-device.txt "$(echo "$folder"/dist/*.whl)[edge,report]" pytest
"$folder/venv/bin/python" - << 'PYTHON'
import sys, numpy, onnxruntime, offramp
assert "site-packages" in offramp.__file__, "the wheel is tested, not the checkout: " + offramp.__file__
print("device: Python", sys.version.split()[0], "NumPy", numpy.__version__, "ONNX Runtime", onnxruntime.__version__)
PYTHON
shift || true
# CI gives -m "not slow", a sample: each store under a third of its exit rules, and fewer stores by the commands.
[ $# -gt 0 ] || set -- -k "not third"
"$folder/venv/bin/python" -m pytest tests/golden "$@"
