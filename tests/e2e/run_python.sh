#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# run_python.sh PYTHON ARGUMENT…: for ctest. Fails, with the fix, where the Python environment is missing.
python="$1"
shift
if ! [ -x "$python" ]; then
  echo "FAILED: no Python at $python, so no end-to-end test can run." >&2
  echo "Fix: run ./tests/run.sh once (it makes tests/.venv), or configure with -DSTRAIT_PYTHON=PATH of a" >&2
  echo "Python that has the packages of tests/requirements.txt." >&2
  exit 1
fi
exec "$python" -B "$@"
