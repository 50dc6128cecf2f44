#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Installs what the tests need, builds, and runs every test that needs no GPU. Ends with ctest's summary.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
STRAIT_ROOT="$PWD"
. deploy/setup.sh
strait_tests=ON

usage() {
  cat <<'USAGE'
usage: tests/run.sh [options]
  Without options, everything:
    release   all tests: unit, simulator, end-to-end with real processes, benchmarks' smoke runs
    dev       AddressSanitizer and UBSan: unit tests and simulator
    cuda      compiled where nvcc is found and there is CUDA code
  --tsan            also ThreadSanitizer: unit tests and simulator
  --soak SECONDS    the simulator runs new seeds for so long
  --tokenizer FILE  only checks our tokenizer against a real tokenizer.json, by Hugging Face `tokenizers`
  --only PRESET     only this one of release, dev, tsan, cuda
  --label REGEX     only ctest labels that match (unit, sim, e2e, bench)
  --no-install      installs no packages
USAGE
}

tsan= soak= tokenizer= only= label= install=1
need_value() { [ $# -ge 2 ] || { echo "tests/run.sh: $1 needs a value" >&2; exit 2; }; }
while [ $# -gt 0 ]; do
  case "$1" in
    --tsan) tsan=1 ;;
    --soak) need_value "$@"; soak="$2"; shift ;;
    --tokenizer) need_value "$@"; tokenizer="$(realpath "$2")"; shift ;;
    --only) need_value "$@"; only="$2"; shift ;;
    --label) need_value "$@"; label="$2"; shift ;;
    --no-install) install= ;;
    -h|--help) usage; exit 0 ;;
    *) echo "tests/run.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
[ -z "$tokenizer" ] || [ -r "$tokenizer" ] || strait_fail "cannot read $tokenizer"

times=
phase_name= phase_start=0
phase() {  # ends the phase before, starts this one
  [ -z "$phase_name" ] || times="$times$(printf '    %5d s  %s' $((SECONDS - phase_start)) "$phase_name")"$'\n'
  phase_name="$1" phase_start=$SECONDS
  [ -z "$1" ] || strait_say "=== $1"
}
wanted() { [ -z "$only" ] || [ "$only" = "$1" ]; }
failed=

# ---- Packages, Python ----
phase "packages"
if [ -n "$install" ]; then strait_need_packages build tests; fi

phase "Python environment tests/.venv"
venv="$STRAIT_ROOT/tests/.venv"
stamp="$venv/requirements.sha256"
sum="$(sha256sum tests/requirements.txt)"
if [ ! -x "$venv/bin/python" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$sum" ]; then
  rm -rf "$venv"
  python3 -m venv "$venv" &&
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt </dev/null ||
    strait_fail "could not make tests/.venv from tests/requirements.txt"
  printf '%s\n' "$sum" >"$stamp"
fi

run_ctest() {  # build folder, label regex ("" = all), more arguments…
  local folder="$1" labels="$2"
  shift 2
  ctest --test-dir "$folder" --output-on-failure --no-tests=error -j "$(nproc)" \
    ${labels:+-L "$labels"} "$@" </dev/null
}

if [ -n "$tokenizer" ]; then
  phase "tokenizer $tokenizer"
  strait_build release tokenizer_check
  exec "$venv/bin/python" -B tests/coordinator/text/check_tokenizer.py \
    --program build/release/tests/tokenizer_check --tokenizer "$tokenizer"
fi

# ---- Builds; sanitizers run first so that the last lines are the release tests' ----
if wanted release; then
  phase "release build"
  strait_build release
fi

if wanted dev; then
  phase "dev build (AddressSanitizer, UBSan)"
  strait_build dev tests_unit tests_sim
  phase "dev tests"
  UBSAN_OPTIONS=print_stacktrace=1 run_ctest build/dev "${label:-^(unit|sim)$}" || failed="$failed dev"
fi

if [ -n "$tsan" ] || [ "$only" = tsan ]; then
  phase "tsan build (ThreadSanitizer)"
  strait_build tsan tests_unit tests_sim
  phase "tsan tests"
  # Without setarch -R, high-entropy address layouts make gcc 12's ThreadSanitizer refuse to start.
  TSAN_OPTIONS="suppressions=$STRAIT_ROOT/tests/tsan.supp second_deadlock_stack=1" \
    setarch -R ctest --test-dir build/tsan --output-on-failure --no-tests=error \
      -L "${label:-^(unit|sim)$}" </dev/null || failed="$failed tsan"
fi

if wanted cuda; then
  phase "cuda build"
  nvcc="$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)"
  if [ -z "$nvcc" ]; then
    strait_say "SKIPPED: no nvcc here, so the cuda preset was not compiled."
  elif [ -z "$(find kernels worker -name '*.cu' -print -quit)" ]; then
    strait_say "SKIPPED: nvcc is here, but the tree holds no CUDA code (*.cu) yet, so nothing was compiled."
  else
    CUDACXX="$nvcc" strait_build cuda
    phase "cuda tests: on the host, and in the emulator"
    run_ctest build/cuda '^unit$' -R '^cuda_' || failed="$failed cuda"
    run_ctest build/cuda '^emulator$' -j "$(nproc)" || failed="$failed emulator"
    strait_say "The same tests on a GPU, and its benchmarks, are tests/gpu.sh's."
  fi
fi

if [ -n "$soak" ]; then
  phase "simulator soak, $soak s"
  seed="$(date +%s)000" until=$((SECONDS + soak))
  while [ "$SECONDS" -lt "$until" ]; do
    build/release/tests/strait_sim --seed "$seed" --count 500 </dev/null || { failed="$failed soak"; break; }
    seed=$((seed + 500))
  done
fi

phase ""
strait_say "Time so far:"
printf '%s' "$times"
[ -z "$failed" ] || strait_say "FAILED:$failed (see above)"
if wanted release; then
  strait_say "=== release tests"
  run_ctest build/release "$label" || failed="$failed release"
fi
[ -z "$failed" ]
