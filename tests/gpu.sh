#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs an NVIDIA GPU: builds the cuda preset if it can, runs the GPU unit tests, the end-to-end suites
# with CUDA workers (exactness, same tokens with --deterministic, clients that disconnect), and the benchmarks, whose
# data it writes as JSON.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
STRAIT_ROOT="$PWD"
. deploy/setup.sh
strait_tests=ON

usage() {
  cat <<'USAGE'
usage: tests/gpu.sh [options]
  --out FOLDER       results: logs, gpu.json (default: build/gpu)
  --pack FOLDER      only builds, and puts the programs with the libraries they need there: for a GPU machine that
                     cannot build. There: tests/gpu.sh --programs FOLDER
  --programs FOLDER  builds nothing, uses the programs of --pack
  --only PART        one of unit, exactness, same-tokens, disconnects, survivors, nccl (ranks that share a GPU; with more GPUs
                     also one on each of up to four), bench, sanitizer; may be repeated (default: all but sanitizer)
  --cases LIST       of the benchmarks, e.g. "gemm v3" (default: gemm mla v2-lite v3 price rows serve)
  --jobs N           end-to-end tests at once, where pytest-xdist is there (default: 4)
End-to-end parts need pytest and httpx (tests/run.sh installs them), nccl also nvidia-cuda-mps-control. gpu.json is written by
bench, of that run's cases and hops: for gpu_page.py run nccl and all cases into one --out.
USAGE
}

out=build/gpu pack= programs= parts= jobs=4
all_parts="unit exactness same-tokens disconnects survivors nccl bench"  # by default; and sanitizer
all_cases="gemm mla v2-lite v3 price rows serve"
cases="$all_cases"
need_value() { [ $# -ge 2 ] || { echo "tests/gpu.sh: $1 needs a value" >&2; exit 2; }; }
while [ $# -gt 0 ]; do
  case "$1" in
    --out) need_value "$@"; out="$2"; shift ;;
    --pack) need_value "$@"; pack="$2"; shift ;;
    --programs) need_value "$@"; programs="$2"; shift ;;
    --only) need_value "$@"; parts="$parts $2"; shift ;;
    --cases) need_value "$@"; cases="$2"; shift ;;
    --jobs) need_value "$@"; jobs="$2"; shift ;;
    -h|--help) usage; exit 0 ;;
    *) echo "tests/gpu.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
parts="${parts:-$all_parts}"
known() {  # what, its name, all that there are
  case " $3 " in *" $2 "*) ;; *) echo "tests/gpu.sh: there is no $1 $2, only: $3" >&2; exit 2 ;; esac
}
for part in $parts; do known part "$part" "$all_parts sanitizer"; done
for case in $cases; do known case "$case" "$all_cases"; done
wanted() { case " $parts " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }
failed=
fail() { failed="$failed $1"; strait_say "FAILED: $1${2:+ ($2)}"; }

# ---- Programs ----
if [ -z "$programs" ]; then
  nvcc="$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)"
  [ -n "$nvcc" ] || strait_fail "no nvcc: install the CUDA Toolkit, 12.4 or newer, or give --programs"
  CUDACXX="$nvcc" strait_build cuda tests_gpu strait strait-coordinator strait-worker || exit 1
  programs=build/cuda
fi
if [ -n "$pack" ]; then
  mkdir -p "$pack/bin" "$pack/tests" "$pack/lib"
  cp build/cuda/bin/strait* "$pack/bin/"
  cp build/cuda/tests/cuda_* "$pack/tests/"
  strip "$pack"/bin/* "$pack"/tests/*
  # All but what every system has.
  ldd build/cuda/bin/* build/cuda/tests/cuda_* | awk '$3 ~ /^\// { print $3 }' | sort -u |
    grep -vE '/lib(c|m|stdc\+\+|gcc_s)\.so' | while read -r library; do cp -L "$library" "$pack/lib/"; done
  strait_say "Packed: $(du -sh "$pack" | cut -f1) in $pack"
  exit 0
fi
[ -x "$programs/tests/cuda_device_test" ] || strait_fail "$programs has no tests/cuda_device_test: make it with --pack"
programs="$(realpath "$programs")"
mkdir -p "$out" && out="$(realpath "$out")"
[ -d "$programs/lib" ] && export LD_LIBRARY_PATH="$programs/lib:${LD_LIBRARY_PATH:-}"
export STRAIT_SOURCE_DIR="$STRAIT_ROOT"
"$programs/tests/cuda_device_test" >"$out/device.log" 2>&1 || fail device
gpu="$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | head -n 1)"
[ -n "$gpu" ] || strait_fail "no NVIDIA GPU here (nvidia-smi finds none)"
gpu="$(nvidia-smi -L | grep -c '^GPU') x $gpu"
strait_say "GPU: $gpu"

# ---- Unit tests: each kernel against its reference, the golden checkpoints in one process ----
if wanted unit; then
  strait_say "=== unit tests"
  run_unit() {
    "$programs/tests/$1" --gtest_output="json:$out/$1.json" >"$out/$1.log" 2>&1
    echo $? >"$out/$1.rc"
  }
  for test in "$programs"/tests/cuda_*_test; do
    name="$(basename "$test")"
    [ "$name" = cuda_backend_test ] || run_unit "$name" &
  done
  wait
  run_unit cuda_backend_test  # it looks at the GPU's free memory: alone
  for test in "$programs"/tests/cuda_*_test; do
    name="$(basename "$test")"
    if [ "$(cat "$out/$name.rc")" != 0 ]; then
      fail "$name" "$out/$name.log"
      grep -E "Failure|FAILED|check failed" "$out/$name.log" | head -n 5
    elif grep -q SKIPPED "$out/$name.log"; then
      fail "$name" "it skipped, see $out/$name.log"
    fi
    grep -hE "log-probabilities;" "$out/$name.log"
  done
fi

if wanted sanitizer; then
  strait_say "=== compute-sanitizer"
  command -v compute-sanitizer >/dev/null || strait_fail "no compute-sanitizer: it is part of the CUDA Toolkit"
  sanitize() {  # tool, test
    local filter=()
    case $2 in cuda_gemm_*) filter=('--gtest_filter=*AMatrixAHead:*ExpertsByAList:*ClustersOfSeveralGroups') ;; esac
    compute-sanitizer --tool "$1" --error-exitcode 9 "$programs/tests/$2" ${filter[@]+"${filter[@]}"} \
      >"$out/$1-$2.log" 2>&1
    echo $? >"$out/$1-$2.rc"
  }
  checks=()
  for name in cuda_latent_test cuda_moe_test cuda_gemm_test cuda_gemm_hopper_test cuda_gemm_w8a8_test \
    cuda_quantize_test cuda_sample_test cuda_mha_prefill_test; do
    checks+=("memcheck $name")
    # What mbarriers order, racecheck does not see.
    case $name in cuda_gemm_hopper_test | cuda_gemm_w8a8_test | cuda_mha_prefill_test) continue ;; esac
    checks+=("racecheck $name")
  done
  for check in "${checks[@]}"; do sanitize $check & done
  wait
  for check in "${checks[@]}"; do
    log="$out/${check/ /-}"
    if [ "$(cat "$log.rc")" = 0 ] && grep -q '\[  PASSED  \] [1-9]' "$log.log"; then
      echo "$check: $(grep -E '(ERROR|RACECHECK) SUMMARY' "$log.log")"
    else
      fail "$check" "$log.log"
    fi
  done
fi

# ---- End to end: real clusters whose workers compute on the GPU ----
python=tests/.venv/bin/python
"$python" -c 'import pytest, httpx' 2>/dev/null || python=python3
rows=
# With cache rows of the format $rows, empty: the default.
run_e2e() {  # part, file, what of its output to show, "" or more arguments of pytest…
  local part="$1" file="$2" show="$3"
  shift 3
  strait_say "=== $part, CUDA workers"
  if "$python" -c 'import pytest, httpx' 2>"$out/python.log"; then
    STRAIT_TEST_BACKEND=cuda STRAIT_TEST_CACHE_FORMAT="$rows" STRAIT_BIN="$programs/bin" "$python" -B -m pytest -p no:cacheprovider "$@" -q -rPs \
      --tb=short "tests/e2e/$file" </dev/null >"$out/$part.log" 2>&1 || fail "$part" "$out/$part.log"
    grep -hE "$show|^SKIPPED|^[0-9]+ (passed|failed)|passed|failed" "$out/$part.log" | tail -n 60
  else
    fail "$part" "NOT RUN: $python has no pytest or no httpx; run ./tests/run.sh once, or: pip install pytest httpx"
  fi
}
parallel=(); "$python" -c 'import xdist' 2>/dev/null && parallel=(-n "$jobs")
if wanted exactness; then
  run_e2e exactness test_exactness.py "mean|differ$" ${parallel[@]+"${parallel[@]}"}
  rows=fp8
  run_e2e exactness-fp8-rows test_exactness.py "mean|differ$" ${parallel[@]+"${parallel[@]}"} -k "v3 or reference"
  rows=
fi
if wanted same-tokens; then  # threads and SIMD levels are skipped, and say so
  run_e2e same-tokens test_same_tokens.py "differ" ${parallel[@]+"${parallel[@]}"}
fi
if wanted disconnects; then  # alone: it looks at the GPU's memory
  STRAIT_DISCONNECT_SECONDS="${STRAIT_DISCONNECT_SECONDS:-60}" run_e2e disconnects test_disconnects.py "^seed|^round"
  run_e2e lost-context test_lost_context.py "lost their context"
fi

if wanted survivors; then  # three NCCL ranks share the GPU
  run_e2e survivors test_survivors.py "killed|stage [0-9]"
fi

# ---- Pipelines over NCCL, several ranks on this GPU ----
if wanted nccl; then
  strait_say "=== NCCL"
  nccl_python=tests/.venv/bin/python
  "$nccl_python" -c 'import pytest, httpx' 2>/dev/null || nccl_python=python3
  tests/gpu_nccl.sh "$programs" "$out" "$nccl_python" || fail nccl
fi

# ---- Benchmarks ----
if wanted bench; then
  strait_say "=== benchmarks"
  models=tests/bench/models
  stage="$programs/tests/cuda_stage_bench"
  run_cases() {
    local case
    for case in $cases; do
      case "$case" in
        gemm) "$programs/tests/cuda_gemm_bench" || return ;;
        mla) "$programs/tests/cuda_mla_bench" --json "$out/mla.json" || return ;;
        v2-lite) "$stage" $models/v2-lite 0 27 1@1024 16@1024 64@1024 256@1024 1@32768 16@32768 max@32768 \
          --prefill 8192 || return ;;
        # As many layers as fit with the largest cache of the line.
        v3) "$stage" $models/v3 3 fit 1@4096 16@4096 64@4096 256@4096 1@32768 16@32768 1@131072 --prefill 4096 &&
          "$stage" $models/v3 3 fit 64@32768 256@32768 16@131072 64@131072 &&
          "$stage" $models/v3 3 fit 256@131072 || return ;;
        # What --deterministic costs: the same stage, both ways; and what --fp8-activations gives, with and without.
        price) for mode in "" --deterministic; do
            "$stage" $models/v2-lite 1 9 1@1024 16@1024 64@1024 256@1024 16@32768 --prefill 8192 $mode || return
            for fp8 in "" --fp8-activations; do
              "$stage" $models/v3 3 5 1@4096 16@4096 64@4096 16@32768 --prefill 4096 $mode $fp8 || return
            done
          done ;;
        # What fp8 cache rows give: the same stage, both ways.
        rows) for rows in bf16 fp8; do
            "$stage" $models/v3 3 5 1@32768 16@32768 64@32768 256@32768 1@131072 16@131072 64@131072 --prefill 4096 \
              --cache-format $rows || return
          done ;;
        # And the bare steps that its decoding is made of, at the mean context.
        serve) "$stage" $models/v2-lite 0 27 1@1088 16@1088 64@1088 &&
          "$programs/bin/strait" bench --model $models/v2-lite --random-weights 1 --backend cuda --workers 1 \
          --concurrency 1,16,64 --prompt-tokens 1024 --output-tokens 128 --requests 64 --warmup 4 \
          --json "$out/serve.json" </dev/null || return ;;
      esac
    done
  }
  run_cases >"$out/bench.log" 2>&1 || fail bench "$out/bench.log"
  grep -v '^JSON' "$out/bench.log"
  {
    printf '{"gpu": "%s", "results": [\n' "$gpu"
    cat "$out/bench.log" "$out"/nccl_hop_*.log 2>/dev/null | sed -n 's/^JSON //p' | sed '$!s/$/,/'
    printf ']}\n'
  } >"$out/gpu.json"
  strait_say "Data: $out/gpu.json"
fi

[ -z "$failed" ] || strait_say "FAILED:$failed"
[ -z "$failed" ] && strait_say "All of it passed:$parts"
[ -z "$failed" ]
